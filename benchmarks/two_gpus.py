"""What two GPUs of one host do beside one, in one command: ``python benchmarks/two_gpus.py [--help]``.

Trains the same rows in one process, and at tensor, pipeline and data parallel 2 over nccl, with the distributed
optimizer: Qwen2.5-0.5B with every weight and 7B with LoRA, random weights, as ``python launch.py`` runs them. Goes on
at data parallel 2 from what was saved at tensor parallel 2. Runs a sweep of 8 trials over both GPUs, one and two trials
on each. Prints one table in Markdown for each. On a CPU the embedded model shows the same over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LAYOUTS = {
    "one": [],
    "TP2": ["cluster.devices=2", "cluster.tensor_parallel=2"],
    "PP2": ["cluster.devices=2", "cluster.pipeline_parallel=2"],
    "DP2": ["cluster.devices=2"],
}
SAME_LEVERS = [
    f"speed.{name}=never" for name in ("compile", "cuda_graphs", "linear_cross_entropy", "low_rank_products")
]
"""All layouts are compared with those levers that all can have by default."""
FULL, LORA = ["peft=none"], ["peft=lora", "peft.rank=32", "peft.alpha=32", "peft.dropout=0"]
SIZES = {"0.5b": [*FULL, "task.sequence_length=2048"], "7b": [*LORA, "task.sequence_length=2048"]}
ON_CPU = {"embedded": [*FULL, "task.sequence_length=128"]}
STEPS, WARM = 8, 3
LOADED = re.compile(r"Loaded .*: \d+ shards, ([\d.]+) MB read in ([\d.]+) s by rank (\d+)")
SEVERAL = ["lr=1e-4,2e-4,3e-4,4e-4", "peft.rank=8,16"]
PARTS = ("layouts", "resume", "sweep")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPUs if there are any")
    parser.add_argument("--shapes", nargs="+", choices=SIZES, default=list(SIZES), help="on GPUs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--overrides",
        nargs="*",
        default=SAME_LEVERS,
        help=f"of all runs, as to launch.py; default {' '.join(SAME_LEVERS)}",
    )
    parser.add_argument("--directory", type=Path, help="where the temporary directory with models and runs is made")
    arguments = parser.parse_args()
    from benchmarks.load import SHAPES, _default_device, _machine, write_model
    from qwen_cl.devices import visible_gpus

    device = arguments.device or _default_device()
    if device == "cuda" and (gpus := len(visible_gpus())) < 2:
        parser.error(f"--device cuda needs two GPUs, and {gpus} is here; --device cpu shows the same over gloo")
    print(f"On {_machine(device)}; {len(visible_gpus()) if device == 'cuda' else 0} GPUs\n")
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="two-gpus-") as temporary:
        base = Path(temporary)
        sizes = {name: SIZES[name] for name in arguments.shapes} if device == "cuda" else ON_CPU
        for name, said in sizes.items():
            model = base / f"model-{name}" if device == "cuda" else ROOT / "qwen_cl/demo/model"
            if device == "cuda":
                write_model(model, SHAPES[name])
            common = [*_common(model, device), *said, *arguments.overrides]
            if "layouts" in arguments.parts:
                _print_layouts(name, {key: _train(base / f"{name}-{key}", common, key) for key in LAYOUTS})
            if "resume" in arguments.parts and name == next(iter(sizes)):
                _print_resumed(base, common)
            if "sweep" in arguments.parts and name == next(iter(sizes)):
                _print_sweeps({count: _sweep(base / f"sweep-{count}", count, device, common) for count in (1, 2)})
    return 0


def _common(model: Path, device: str) -> list[str]:
    return [
        *("task=pretrain", "data=mock", "data.rows=96", "retention=none", "model=local", f"model.source='{model}'"),
        *("model.verify=none", "wandb.mode=disabled", f"cluster.accelerator={'gpu' if device == 'cuda' else 'cpu'}"),
        *("task.global_batch_size=8", "task.micro_batch_size=2", "task.sample_prompts=0", "task.log_interval=1"),
        *("task.lr_schedule=constant", "task.warmup_steps=0", "lr=1e-4", "task.val_check_interval=1000"),
        f"task.checkpoint_interval={STEPS}",
    ]


def _launch(directory: Path, *said: str) -> list[dict[str, Any]]:
    """The lines of its metrics; ends this program where the run fails."""
    print(f"{directory.name} …", file=sys.stderr, flush=True)
    command = [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir='{directory}'", *said]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        log = directory / "run.log"
        raise SystemExit((log.read_text(errors="replace")[-5000:] if log.exists() else "") + done.stderr[-3000:])
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _train(directory: Path, common: list[str], layout: str) -> dict[str, Any]:
    lines = _launch(directory, *common, *LAYOUTS[layout], f"task.max_steps={STEPS}")
    steps = [line for line in lines if "train/loss" in line]
    loaded = LOADED.findall((directory / "run.log").read_text(encoding="utf-8", errors="replace"))
    weights = sum(path.stat().st_size for path in directory.rglob("*") if _is_copy(path, directory))
    return {
        "losses": [line["train/loss"] for line in steps],
        "rate": statistics.median(line["throughput/tokens_per_second"] for line in steps[WARM:]),
        "peak": max(line["memory/peak_gib"] for line in steps),
        "read": [float(megabytes) for megabytes, _, _ in loaded],
        "seconds": [float(seconds) for _, seconds, _ in loaded],
        "copied": weights,
    }


def _is_copy(path: Path, directory: Path) -> bool:
    """Of what a run wrote before it trained: nothing of the model's weights should be there."""
    trained = (directory / "checkpoints", directory / "adapter")
    return path.is_file() and path.suffix != ".log" and not any(place in path.parents for place in trained)


def _print_layouts(name: str, runs: dict[str, dict[str, Any]]) -> None:
    one = runs["one"]
    print(f"{name}, {STEPS} steps of 8 rows; of one process, the others' losses and speed beside it\n")
    print("| layout | first loss | apart | tokens/s | times one | peak GiB | loaded in s | MB read by each rank |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for layout, run in runs.items():
        apart = max(abs(ours - theirs) for ours, theirs in zip(run["losses"], one["losses"]))
        print(
            f"| {layout} | {run['losses'][0]:.4f} | {apart:.4f} | {run['rate']:,.0f} | {run['rate'] / one['rate']:.2f} "
            f"| {run['peak']:.1f} | {max(run['seconds']):.2f} | {', '.join(f'{each:,.1f}' for each in run['read'])} |"
        )
    written = max(run["copied"] for run in runs.values())
    print(f"\nBeside checkpoints, no run wrote more than {written / 1e6:.1f} MB.\n")


def _print_resumed(base: Path, common: list[str]) -> None:
    """Saved at tensor parallel 2, gone on with at data parallel 2; and all of it in one process."""
    more = [f"task.max_steps={STEPS + 4}", "task.checkpoint_interval=100"]
    whole = _launch(base / "whole", *common, *more)
    _launch(base / "resumed", *common, *LAYOUTS["TP2"], f"task.max_steps={STEPS}")
    lines = _launch(base / "resumed", *common, *LAYOUTS["DP2"], *more, "resume.allow=[task.max_steps]")
    ours, theirs = ({s["step"]: s["train/loss"] for s in each if "train/loss" in s} for each in (lines, whole))
    print(f"Saved at TP2 after step {STEPS}, gone on with at DP2; in one process\n\n| step | loss | in one process |")
    print("|---:|---:|---:|")
    for step in range(STEPS - 1, STEPS + 5):
        print(f"| {step} | {ours[step]:.4f} | {theirs[step]:.4f} |")
    print()


def _sweep(directory: Path, on_each: int, device: str, common: list[str]) -> dict[str, Any]:
    slots = f"trials_per_gpu={on_each}" if device == "cuda" else f"cpu_slots={2 * on_each}"
    said = [f"hydra.sweep.dir='{directory}'", *common, "peft=lora", f"hydra.launcher.{slots}", *SEVERAL]
    said += ["task.sequence_length=512" if device == "cuda" else "task.sequence_length=64", "task.max_steps=20"]
    print(f"{directory.name} …", file=sys.stderr, flush=True)
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *said]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    seconds, spans = time.monotonic() - started, []
    for path in directory.glob("*/trial.json"):
        status = json.loads((path.parent / "status.json").read_text(encoding="utf-8"))
        where = ",".join(json.loads(path.read_text(encoding="utf-8"))["visible_devices"])
        spans.append((where, status["start"], status["end"]))
    return {"seconds": seconds, "spans": spans, "on_each": on_each}


def _print_sweeps(sweeps: dict[int, dict[str, Any]]) -> None:
    print("| trials on a GPU | seconds of the sweep | trials by GPU | most at once on one GPU |\n|---:|---:|---|---:|")
    for count, sweep in sweeps.items():
        places = sorted({where for where, _, _ in sweep["spans"]})
        by_place = {place: [span[1:] for span in sweep["spans"] if span[0] == place] for place in places}
        shown = ", ".join(f"{place or 'CPU'}: {len(spans)}" for place, spans in by_place.items())
        most = max(_most_at_once(spans) for spans in by_place.values())
        print(f"| {count} | {sweep['seconds']:.0f} | {shown} | {most} |")


def _most_at_once(spans: list[tuple[str, str]]) -> int:
    """Of times as in status.json, to the second: one that begins in the second in which another ends comes after it."""
    return max(sum(start <= at < end for start, end in spans) for at, _ in spans)


if __name__ == "__main__":
    sys.exit(main())
