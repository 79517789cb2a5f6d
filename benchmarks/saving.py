"""Measure the cost of asynchronous and synchronous checkpoints: ``python benchmarks/saving.py [--help]``.

Run full fine-tuning of Qwen2.5 with random weights as ``python launch.py`` does, with a checkpoint every few steps,
written asynchronously and synchronously: 0.5B on a GPU, a small model on a CPU. Prints a Markdown table of the seconds
that each checkpoint adds to the steps, and of its size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import default_device, existing_device, machine, positive  # noqa: E402

MODES = ("task.async_save=true", "task.async_save=false")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--saves", type=positive, default=3, help="checkpoints per run, besides that of the last step")
    parser.add_argument("--every", type=positive, help="steps between them; default 40, on a CPU 6")
    parser.add_argument("--directory", type=Path, help="parent of the temporary directory")
    arguments = parser.parse_args()
    from benchmarks.load import SHAPES, write_model

    device = arguments.device or default_device()
    every = arguments.every or (40 if device == "cuda" else 6)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="saving-") as temporary:
        base = Path(temporary)
        write_model(base / "model", SHAPES["0.5b" if device == "cuda" else "tiny"])
        print(f"On {machine(device)}; {arguments.saves} checkpoints, one every {every} steps\n")
        print("| | seconds added per checkpoint | median step | GB |\n|---|---:|---:|---:|")
        for name in (*MODES, *reversed(MODES)):
            print(_row(base / f"run-{len(list(base.iterdir()))}", name, device, arguments.saves, every), flush=True)
    return 0


def _row(directory: Path, mode: str, device: str, saves: int, every: int) -> str:
    length, on_gpu = (2048 if device == "cuda" else 64), device == "cuda"
    steps = every * (saves + 1)
    command = [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir='{directory}'", mode, "task=pretrain"]
    command += ["data=mock", f"data.rows={8 * steps}", "retention=none", "model=local", "model.verify=none"]
    command += [f"model.source='{directory.parent / 'model'}'", "peft=full", "wandb.mode=disabled", "lr=1e-5"]
    command += [f"task.sequence_length={length}", "task.global_batch_size=8", "task.micro_batch_size=4"]
    command += [f"task.max_steps={steps}", f"task.checkpoint_interval={every}", "task.val_check_interval=100000"]
    command += [
        "task.sample_prompts=0",
        "task.warmup_steps=1",
        "task.keep_last=1",
        f"cluster.accelerator={'gpu' if on_gpu else 'cpu'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        log = directory / "run.log"
        raise SystemExit((log.read_text(errors="replace")[-5000:] if log.exists() else "") + done.stderr[-3000:])
    lines = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    ends = {line["step"]: line["time"] for line in lines if "train/loss" in line}
    seconds = [after - before for before, after in pairwise(ends[step] for step in range(every // 2, steps + 1))]
    median = statistics.median(seconds)
    added = (sum(seconds) - median * len(seconds)) / saves
    size = sum(path.stat().st_size for path in (directory / "checkpoints").rglob("*") if path.is_file())
    return f"| {mode} | {added:.2f} | {median:.3f} | {size / 1e9:.2f} |"


if __name__ == "__main__":
    sys.exit(main())
