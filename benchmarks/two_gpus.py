"""Compare two GPUs of one host with one GPU: ``python benchmarks/two_gpus.py [--help]``.

Train on the same sequences on one GPU, and at tensor, pipeline and data parallel 2 over NCCL, with the distributed
optimizer: full fine-tuning of Qwen2.5-0.5B and LoRA on 7B, with random weights, as ``python launch.py`` runs them. The
run at tensor parallel 2 is resumed at data parallel 2 and compared with an uninterrupted run on one GPU. A sweep of 8
trials of the bundled demo model uses both GPUs, with one and two trials on each. Prints a Markdown table for each. On
a CPU the bundled demo model trains in the same layouts over gloo.
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
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import default_device, existing_device, machine  # noqa: E402

LAYOUTS = {
    "one": [],
    "TP2": ["cluster.devices=2", "cluster.tensor_parallel=2"],
    "PP2": ["cluster.devices=2", "cluster.pipeline_parallel=2"],
    "DP2": ["cluster.devices=2"],
}
SAME_OPTIMIZATIONS = [
    f"speed.{name}=never"
    for name in ("compile", "cuda_graphs", "fused_linear_cross_entropy", "fused_lora", "fused_grad_accumulation")
]
"""The overrides that leave on only the speed optimizations that ``auto`` enables in every layout."""
FULL, LORA = ["peft=full"], ["peft=lora", "peft.rank=32", "peft.alpha=32", "peft.dropout=0"]
SIZES = {"0.5b": [*FULL, "task.sequence_length=2048"], "7b": [*LORA, "task.sequence_length=2048"]}
ON_CPU = {"demo": [*FULL, "task.sequence_length=128"]}
STEPS, MORE, WARMUP = 8, 4, 3
DEMO = ROOT / "qwen_cl/demo/model"
LOADED = re.compile(r"Loaded .*: \d+ shards, ([\d.]+) MB read in ([\d.]+) s by rank (\d+)")
GRID = ["lr=1e-4,2e-4,3e-4,4e-4", "peft.rank=8,16"]
PARTS = ("layouts", "sweep")
HEADINGS = """\
| layout | first loss | max loss difference | tokens/s | speedup over 1 GPU | efficiency | peak GiB | load time, s \
| MB read by each rank |
|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPUs if there are any"
    )
    parser.add_argument("--shapes", nargs="+", choices=SIZES, default=list(SIZES), help="model sizes, on GPUs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="'one' always runs")
    parser.add_argument(
        "--overrides",
        nargs="*",
        default=SAME_OPTIMIZATIONS,
        help=f"overrides of all runs; default: {' '.join(SAME_OPTIMIZATIONS)}",
    )
    parser.add_argument("--directory", type=Path, help="parent of the temporary directory")
    arguments = parser.parse_args()
    from benchmarks.load import SHAPES, write_model
    from qwen_cl.planning.devices import visible_gpus

    device = arguments.device or default_device()
    if device == "cuda" and (gpus := len(visible_gpus())) < 2:
        parser.error(
            f"--device cuda needs two GPUs, but {gpus} is visible; --device cpu runs the same layouts over gloo"
        )
    print(f"On {machine(device)}; {len(visible_gpus()) if device == 'cuda' else 0} GPUs\n", flush=True)
    failed = False
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="two-gpus-") as temporary:
        base = Path(temporary)
        sizes = {name: SIZES[name] for name in arguments.shapes} if device == "cuda" else ON_CPU
        models = {name: base / f"model-{name}" if device == "cuda" else DEMO for name in sizes}
        making = {
            name: threading.Thread(target=write_model, args=(model, SHAPES[name]))
            for name, model in models.items()
            if device == "cuda" and "layouts" in arguments.parts
        }
        for thread in making.values():
            thread.start()  # writes the next model while the previous one trains
        for name, overrides in sizes.items() if "layouts" in arguments.parts else ():
            if name in making:
                making[name].join()
            common = [*_common(models[name], device), *overrides, *arguments.overrides]
            layouts = [layout for layout in LAYOUTS if layout in ("one", *arguments.layouts)]
            resumed = name == next(iter(sizes)) and "TP2" in layouts
            failed |= _compare_layouts(base / name, common, name, layouts, resumed)
        if "sweep" in arguments.parts:
            failed |= _compare_sweeps(base, device, [*_common(DEMO, device), *arguments.overrides])
    return int(failed)


def _common(model: Path, device: str) -> list[str]:
    return [
        *("task=pretrain", "data=mock", "data.rows=96", "retention=none", "model=local", f"model.source='{model}'"),
        *("model.verify=none", "wandb.mode=disabled", f"cluster.accelerator={'gpu' if device == 'cuda' else 'cpu'}"),
        *("task.global_batch_size=8", "task.micro_batch_size=2", "task.sample_prompts=0", "task.log_interval=1"),
        *("task.lr_schedule=constant", "task.warmup_steps=0", "lr=1e-4", "task.val_check_interval=1000"),
        "task.checkpoint_interval=1000",
    ]


class Run:
    """A process of ``launch.py``; it writes its last checkpoint while the next process starts."""

    def __init__(self, directory: Path, *overrides: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {directory.name} …", file=sys.stderr, flush=True)
        self.directory = directory
        self.before = len(self.lines())
        command = [sys.executable, str(ROOT / "launch.py"), *overrides]
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as this object
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT, env=dict(os.environ))

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, including those before a resume."""
        path = self.directory / "metrics.jsonl"
        complete = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in complete.splitlines()]

    def train(self, last_step: int) -> None:
        """Wait until the last step is logged or the process ends."""
        while self.process.poll() is None and not any(
            line["step"] == last_step for line in self.lines()[self.before :]
        ):
            time.sleep(0.2)

    def end(self) -> None:
        """Wait for the process; on failure print the end of its output to stderr and raise RuntimeError."""
        if not self.process.wait():
            return
        self.output.seek(0)
        log = self.directory / "run.log"
        print(
            log.read_text(errors="replace")[-5000:] if log.exists() else "", self.output.read()[-3000:], file=sys.stderr
        )
        raise RuntimeError(f"exit code {self.process.returncode}")


def _train(base: Path, common: list[str], layout: str, steps: int) -> Run:
    directory = base.with_name(f"{base.name}-{layout}")
    run = Run(directory, f"hydra.run.dir='{directory}'", *common, *LAYOUTS[layout], f"task.max_steps={steps}")
    run.train(steps)
    return run


def _measured(run: Run) -> dict[str, Any]:
    try:
        run.end()
    except RuntimeError as error:
        return {"error": f"failed: {error}"}
    done = [line for line in run.lines() if "train/loss" in line]
    loaded = LOADED.findall((run.directory / "run.log").read_text(encoding="utf-8", errors="replace"))
    return {
        "losses": {line["step"]: line["train/loss"] for line in done},
        "rate": statistics.median(line["throughput/tokens_per_second"] for line in done[WARMUP:]),
        "peak": max(line["memory/peak_gib"] for line in done),
        "read": [float(megabytes) for megabytes, _, _ in loaded],
        "seconds": [float(seconds) for _, seconds, _ in loaded],
        "copied": sum(path.stat().st_size for path in run.directory.rglob("*") if _is_copy(path, run.directory)),
    }


def _is_copy(path: Path, directory: Path) -> bool:
    """Return whether a run wrote this file outside checkpoints and adapter: none should hold the model's weights."""
    trained = (directory / "checkpoints", directory / "adapter")
    return path.is_file() and path.suffix != ".log" and not any(place in path.parents for place in trained)


def _compare_layouts(base: Path, common: list[str], name: str, layouts: list[str], resumed: bool) -> bool:
    """Compare the layouts and return whether any failed; with ``resumed``, resume the TP2 run at DP2 as well."""
    steps = {layout: STEPS + MORE * (resumed and layout == "one") for layout in layouts}
    started = {layout: _train(base, common, layout, steps[layout]) for layout in layouts}
    runs = {layout: _measured(run) for layout, run in started.items()}
    print(f"{name}, {STEPS} steps of 8 sequences; loss difference and speedup are relative to one process\n")
    print(HEADINGS)
    for layout, run in runs.items():
        processes = 1 if layout == "one" else 2
        print(f"| {layout} | {run['error'] if 'error' in run else _cells(run, runs['one'], processes)} |")
    written = max((run["copied"] for run in runs.values() if "error" not in run), default=0)
    print(f"\nBesides checkpoints, no run wrote more than {written / 1e6:.1f} MB.\n", flush=True)
    failed = any("error" in run for run in runs.values())
    return failed or (resumed and _resume(base.with_name(f"{name}-TP2"), common, runs["one"]["losses"]))


def _cells(run: dict[str, Any], one: dict[str, Any], processes: int) -> str:
    compared = "error" not in one
    difference = (
        max(abs(loss - one["losses"][step]) for step, loss in run["losses"].items()) if compared else float("nan")
    )
    speedup = run["rate"] / one["rate"] if compared else float("nan")
    return (
        f"{next(iter(run['losses'].values())):.4f} | {difference:.4f} | {run['rate']:,.0f} "
        f"| {speedup:.2f} | {speedup / processes:.0%} | {run['peak']:.1f} "
        f"| {max(run['seconds']):.2f} | {', '.join(f'{each:,.1f}' for each in run['read'])}"
    )


def _resume(directory: Path, common: list[str], expected: dict[int, float]) -> bool:
    """Resume the TP2 checkpoint at data parallel 2 and return whether that failed."""
    more = [f"task.max_steps={STEPS + MORE}", "resume.allow_changes=[task.max_steps]"]
    run = Run(directory, f"hydra.run.dir='{directory}'", *common, *LAYOUTS["DP2"], *more)
    try:
        run.end()
    except RuntimeError as error:
        print(f"The TP2 checkpoint could not be resumed at DP2: {error}\n", flush=True)
        return True
    losses = {line["step"]: line["train/loss"] for line in run.lines() if "train/loss" in line}
    print(f"Saved at TP2 after step {STEPS} and resumed at DP2\n\n| step | loss | loss of one process |")
    print("|---:|---:|---:|")
    for step in range(STEPS - 1, STEPS + MORE + 1):
        print(f"| {step} | {losses[step]:.4f} | {expected[step]:.4f} |")
    print(flush=True)
    return False


def _compare_sweeps(base: Path, device: str, common: list[str]) -> bool:
    print("| trials per GPU | seconds | trials by GPU | max concurrent trials on one GPU |\n|---:|---:|---|---:|")
    failed = False
    for per_gpu in (1, 2):
        try:
            cells = _sweep(base / f"sweep-{per_gpu}", per_gpu, device, common)
        except RuntimeError as error:
            cells, failed = f"failed: {error} | | ", True
        print(f"| {per_gpu} | {cells} |", flush=True)
    return failed


def _sweep(directory: Path, per_gpu: int, device: str, common: list[str]) -> str:
    slots = f"trials_per_gpu={per_gpu}" if device == "cuda" else f"cpu_slots={2 * per_gpu}"
    overrides = [f"hydra.sweep.dir='{directory}'", *common, "peft=lora", f"hydra.launcher.{slots}", *GRID]
    overrides += ["task.sequence_length=512" if device == "cuda" else "task.sequence_length=64", "task.max_steps=20"]
    started = time.monotonic()
    Run(directory, "-m", *overrides).end()
    seconds = time.monotonic() - started
    spans: dict[str, list[tuple[str, str]]] = {}
    for path in directory.glob("*/trial.json"):
        status = json.loads((path.parent / "status.json").read_text(encoding="utf-8"))
        where = ",".join(json.loads(path.read_text(encoding="utf-8"))["visible_devices"]) or "CPU"
        spans.setdefault(where, []).append((status["start"], status["end"]))
    concurrent = max(_max_concurrent(each) for each in spans.values())
    return f"{seconds:.0f} | {', '.join(f'{where}: {len(spans[where])}' for where in sorted(spans))} | {concurrent}"


def _max_concurrent(spans: list[tuple[str, str]]) -> int:
    """Return how many spans overlap at most; times are to the second, and a span does not include its last one."""
    return max(sum(start <= at < end for start, end in spans) for at, _ in spans)


if __name__ == "__main__":
    sys.exit(main())
