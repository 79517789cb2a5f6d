"""Compare training speed with other frameworks: ``python benchmarks/throughput.py [--help]``.

The frameworks train in turn, in the order A-B-C-C-B-A, each in its own process (C-C in one), from the same weights on
the same tokens: qwen_cl as ``python launch.py`` runs it, and transformers with PEFT, eager and under torch.compile. On
a GPU the model is Qwen2.5-0.5B with random weights in bf16, on sequences of 2,048 tokens, 16 per step; on a CPU it is
the bundled demo model in fp32. Prints a Markdown table and writes the results to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import default_device, existing_device, existing_file, machine, positive  # noqa: E402
from benchmarks.load import SHAPES  # noqa: E402
from benchmarks.throughput_table import OURS, table  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
SEED, LR, TIMEOUT_SECONDS = 1234, 1e-4, 240
SHOWN_VERSIONS = ("torch", "nemo_toolkit", "megatron-core", "transformers", "peft", "liger-kernel", "trl")
BASELINES: dict[str, dict[str, Any]] = {
    "transformers, eager": {"compiled": False, "liger": False},
    "transformers, compiled": {"compiled": True, "liger": False},
    "transformers, liger": {"compiled": False, "liger": True},
    "TRL, compiled": {"compiled": True, "liger": False, "program": "benchmarks.trl_baseline"},
}
"""The first two run by default; the others need ``pip install -c constraints.txt -e '.[baselines]'``."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--shape", choices=SHAPES, default="0.5b", help="Qwen2.5 size, on a GPU")
    parser.add_argument("--training", choices=("lora", "full"), nargs="+", default=["lora", "full"])
    frameworks = [OURS, *BASELINES]
    parser.add_argument(
        "--frameworks", nargs="+", choices=frameworks, default=frameworks[:3], help="default: the first three"
    )
    parser.add_argument("--micro-batch", type=positive, nargs="+", default=None, help="default 4; on a CPU 2")
    parser.add_argument("--sequence-length", type=positive, help="default 2048; on a CPU 128")
    parser.add_argument("--global-batch", type=positive, help="sequences per step; default 16; on a CPU 8")
    parser.add_argument("--warmup-steps", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=20, help="timed steps")
    parser.add_argument("--runs", type=positive, default=2, help="runs per framework: 2 is A-B-C-C-B-A, 1 is A-B-C")
    parser.add_argument("--overrides", nargs="*", default=[], help="overrides of the qwen_cl runs")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/throughput-DEVICE-MODEL.json")
    parser.add_argument("--directory", type=Path, help="parent of the temporary directory")
    parser.add_argument("--table", type=existing_file, nargs="+", help="print the tables of results files and exit")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in arguments.table))
        return 0
    device = arguments.device or default_device()
    rows = arguments.global_batch or (16 if device == "cuda" else 8)
    arguments.micro_batch = arguments.micro_batch or [4 if device == "cuda" else 2]
    for micro in arguments.micro_batch:
        if rows % micro:
            parser.error(f"--micro-batch {micro} must divide --global-batch {rows}, the sequences per step")
    results = measure(arguments, device)
    print(table(results))
    return 1 if any("error" in run for run in results["runs"] if run["framework"] == OURS) else 0


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    from benchmarks.load import write_model
    from qwen_cl.runs.provenance import versions

    on_gpu = device == "cuda"
    common = {
        "device": device,
        "sequence_length": arguments.sequence_length or (2048 if on_gpu else 128),
        "global_batch_size": arguments.global_batch or (16 if on_gpu else 8),
        "warmup_steps": arguments.warmup_steps,
        "timed_steps": arguments.steps,
        "lr": LR,
    }
    results = {
        "command": _command(arguments),
        "date": date.today().isoformat(),
        "machine": machine(device),
        "model": f"Qwen2.5-{arguments.shape.upper()}, random weights" if on_gpu else "the bundled demo model",
        "versions": versions(SHOWN_VERSIONS),
        **common,
        "matrix_flops": _matrix_flops(device),
        "runs": [],
    }
    output = arguments.output or RESULTS / f"throughput-{device}-{arguments.shape if on_gpu else 'demo'}.json"
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="throughput-") as temporary:
        base = Path(temporary)
        model = base / "model" if on_gpu else ROOT / "qwen_cl/demo/model"
        if on_gpu:
            write_model(model, SHAPES[arguments.shape])
        common |= {"model": str(model), "tokens": str(base / "tokens.npy")}
        rows = _write_tokens(common, json.loads((model / "config.json").read_text())["vocab_size"])
        for training in arguments.training:
            for micro in arguments.micro_batch:
                for number, (framework, windows) in enumerate(run_order(arguments.frameworks, arguments.runs)):
                    specification = {**common, "training": training, "micro_batch_size": micro, "rows": rows}
                    specification["timed_steps"] *= windows
                    directory = base / f"{training}-{micro}-{number}"
                    run = _run(framework, specification, directory, arguments.overrides)
                    key = {"framework": framework, "training": training, "micro_batch": micro}
                    results["runs"].append({**key, **run})
                    output.parent.mkdir(parents=True, exist_ok=True)
                    output.write_text(
                        json.dumps(results, indent=1) + "\n"
                    )  # after each run, in case of an interruption
                    if framework == OURS and "error" in run:
                        return results  # there is nothing to compare the others with
    return results


def run_order(frameworks: list[str], runs: int) -> list[tuple[str, int]]:
    """Return the framework of each run, and the factor on its number of timed steps.

    The two runs in the middle are of one framework and share a process: a compiled model takes one to two minutes to
    start.
    """
    if runs < 2 or len(frameworks) < 2:
        return [(framework, 1) for framework in frameworks * runs]
    before = [(framework, 1) for framework in frameworks[:-1]]
    return [*before, (frameworks[-1], 2), *reversed(before)]


def _matrix_flops(device: str) -> float:
    command = [sys.executable, "-m", "benchmarks.matrix_rate", device]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def _write_tokens(common: dict[str, Any], vocab_size: int) -> int:
    """Write the sequences of ``data=mock`` (qwen_cl/data/datamodule.py) in training order and return their number."""
    import numpy as np

    from qwen_cl.data.batching import epoch_order

    size = common["global_batch_size"]
    rows = size * (common["warmup_steps"] + 2 * common["timed_steps"])  # of the longest run
    drawn = np.random.default_rng(SEED).integers(0, vocab_size, (rows, common["sequence_length"] + 1))
    np.save(common["tokens"], drawn[epoch_order(rows, SEED, 0, 0)])
    return rows


def _run(framework: str, specification: dict[str, Any], directory: Path, overrides: list[str]) -> dict[str, Any]:
    from benchmarks.sweep import DeviceWatch

    print(
        f"{framework}, {specification['training']}, micro batch {specification['micro_batch_size']} …", file=sys.stderr
    )
    specification = {**specification, "started": time.time()}
    if framework == OURS:
        command = _our_command(specification, directory, overrides)
    else:
        path = directory.with_suffix(".json")
        path.write_text(json.dumps({**specification, **BASELINES[framework]}))
        command = [sys.executable, "-m", BASELINES[framework].get("program", "benchmarks.baselines"), str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    watch = DeviceWatch(specification["device"])
    try:
        with watch:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
            )
    except subprocess.TimeoutExpired:
        return {"error": f"timed out after {TIMEOUT_SECONDS} s"}
    if done.returncode:
        log = directory / "run.log"
        print(log.read_text(encoding="utf-8")[-4000:] if log.exists() else done.stderr[-4000:], file=sys.stderr)
        lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "FAILED" in line]
        return {"error": (errors or lines or [f"exit code {done.returncode}"])[-1][:300]}
    record = _our_record(specification, directory) if framework == OURS else json.loads(done.stdout.splitlines()[-1])
    busy = watch.busy_between(record.pop("ended") - sum(record["seconds"]), record["seconds"])
    return {**record, "driver_peak": watch.bytes, "busy": busy}


def _our_command(specification: dict[str, Any], directory: Path, overrides: list[str]) -> list[str]:
    steps = specification["warmup_steps"] + specification["timed_steps"]
    lora = specification["training"] == "lora"
    accelerator = "gpu" if specification["device"] == "cuda" else "cpu"
    return [
        *(sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir={directory}"),
        *("task=pretrain", "data=mock", "retention=none", "model=local", f"model.source={specification['model']}"),
        *("model.verify=none", "wandb.mode=disabled", f"cluster.accelerator={accelerator}", f"seed={SEED}"),
        *(["peft=lora", "peft.rank=32", "peft.alpha=32", "peft.dropout=0"] if lora else ["peft=full"]),
        *(f"lr={LR}", "task.lr_schedule=constant", "task.warmup_steps=0", "task.sample_prompts=0"),
        *(f"task.max_steps={steps}", f"task.val_check_interval={steps}", f"task.checkpoint_interval={steps}"),
        *(f"task.{name}={specification[name]}" for name in ("sequence_length", "global_batch_size")),
        *(f"task.micro_batch_size={specification['micro_batch_size']}", f"data.rows={specification['rows']}"),
        *("task.log_interval=1", *overrides),
    ]


def _our_record(specification: dict[str, Any], directory: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    ends = [line["time"] for line in steps]
    timed = ends[specification["warmup_steps"] - 1 :]
    phases = json.loads((directory / "status.json").read_text(encoding="utf-8"))["phase_started_at"]
    return {
        "losses": [line["train/loss"] for line in steps],
        "norms": [line["optim/grad_norm"] for line in steps],
        "first_step": ends[0] - specification["started"],
        "phase_started_at": {phase: round(at - specification["started"], 2) for phase, at in phases.items()},
        "seconds": [end - start for start, end in pairwise(timed)],
        "peak": int(steps[-1]["memory/peak_gib"] * 2**30),
        "mfu": statistics.median(line.get("throughput/mfu", 0.0) for line in steps[specification["warmup_steps"] :]),
        "ended": timed[-1],
    }


def _command(arguments: argparse.Namespace) -> str:
    """Return the command without the arguments that name a path on this machine."""
    paths = ("--output", "--directory", str(arguments.output), str(arguments.directory))
    return shlex.join(["python", "benchmarks/throughput.py", *(each for each in sys.argv[1:] if each not in paths)])


if __name__ == "__main__":
    sys.exit(main())
