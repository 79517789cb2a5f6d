"""What two GPUs of one host do beside one, in one command: ``python benchmarks/two_gpus.py [--help]``.

Trains the same rows in one process, and at tensor, pipeline and data parallel 2 over nccl, with the distributed
optimizer: Qwen2.5-0.5B with every weight and 7B with LoRA, random weights, as ``python launch.py`` runs them. The run
at tensor parallel 2 goes on at data parallel 2, beside one that did all of it in one process. A sweep of 8 trials of
the embedded model takes both GPUs, with one and two trials on each. Prints one table in Markdown for each. On a CPU
the embedded model shows the same over gloo.
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
SAME_LEVERS = [
    f"speed.{name}=never"
    for name in ("compile", "cuda_graphs", "fused_linear_cross_entropy", "fused_lora", "fused_grad_accumulation")
]
"""All layouts are compared with those levers that all have by default."""
FULL, LORA = ["peft=full"], ["peft=lora", "peft.rank=32", "peft.alpha=32", "peft.dropout=0"]
SIZES = {"0.5b": [*FULL, "task.sequence_length=2048"], "7b": [*LORA, "task.sequence_length=2048"]}
ON_CPU = {"embedded": [*FULL, "task.sequence_length=128"]}
STEPS, MORE, WARM = 8, 4, 3
DEMO = ROOT / "qwen_cl/demo/model"
LOADED = re.compile(r"Loaded .*: \d+ shards, ([\d.]+) MB read in ([\d.]+) s by rank (\d+)")
SEVERAL = ["lr=1e-4,2e-4,3e-4,4e-4", "peft.rank=8,16"]
PARTS = ("layouts", "sweep")
HEADINGS = """\
| layout | first loss | apart | tokens/s | times one | efficiency | peak GiB | loaded in s | MB read by each rank |
|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPUs if there are any"
    )
    parser.add_argument("--shapes", nargs="+", choices=SIZES, default=list(SIZES), help="on GPUs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="'one' is always there")
    parser.add_argument(
        "--overrides",
        nargs="*",
        default=SAME_LEVERS,
        help=f"of all runs, as to launch.py; default {' '.join(SAME_LEVERS)}",
    )
    parser.add_argument("--directory", type=Path, help="where the temporary directory with models and runs is made")
    arguments = parser.parse_args()
    from benchmarks.load import SHAPES, write_model
    from qwen_cl.planning.devices import visible_gpus

    device = arguments.device or default_device()
    if device == "cuda" and (gpus := len(visible_gpus())) < 2:
        parser.error(f"--device cuda needs two GPUs, and {gpus} is here; --device cpu shows the same over gloo")
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
            thread.start()  # the next model is made while the one before trains
        for name, said in sizes.items() if "layouts" in arguments.parts else ():
            if name in making:
                making[name].join()
            common = [*_common(models[name], device), *said, *arguments.overrides]
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
    """A process of ``launch.py``, which saves while the next one starts."""

    def __init__(self, directory: Path, *said: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {directory.name} …", file=sys.stderr, flush=True)
        self.directory = directory
        self.before = len(self.lines())
        command = [sys.executable, str(ROOT / "launch.py"), *said]
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as this object
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT, env=dict(os.environ))

    def lines(self) -> list[dict[str, Any]]:
        """Of its metrics, of all its starts."""
        path = self.directory / "metrics.jsonl"
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def train(self, last_step: int) -> None:
        """To the end of its last step, or its own."""
        while self.process.poll() is None and not any(
            line["step"] == last_step for line in self.lines()[self.before :]
        ):
            time.sleep(0.2)

    def end(self) -> None:
        """Raises RuntimeError, with the last of what it said on stderr, where it failed."""
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
        "rate": statistics.median(line["throughput/tokens_per_second"] for line in done[WARM:]),
        "peak": max(line["memory/peak_gib"] for line in done),
        "read": [float(megabytes) for megabytes, _, _ in loaded],
        "seconds": [float(seconds) for _, seconds, _ in loaded],
        "copied": sum(path.stat().st_size for path in run.directory.rglob("*") if _is_copy(path, run.directory)),
    }


def _is_copy(path: Path, directory: Path) -> bool:
    """Of what a run wrote before it trained: nothing of the model's weights should be there."""
    trained = (directory / "checkpoints", directory / "adapter")
    return path.is_file() and path.suffix != ".log" and not any(place in path.parents for place in trained)


def _compare_layouts(base: Path, common: list[str], name: str, layouts: list[str], resumed: bool) -> bool:
    """Returns whether anything failed. With ``resumed``, the run in one process is as long as the resumed one."""
    steps = {layout: STEPS + MORE * (resumed and layout == "one") for layout in layouts}
    started = {layout: _train(base, common, layout, steps[layout]) for layout in layouts}
    runs = {layout: _measured(run) for layout, run in started.items()}
    print(f"{name}, {STEPS} steps of 8 rows; beside one process, the largest difference of a loss, and the speed\n")
    print(HEADINGS)
    for layout, run in runs.items():
        processes = 1 if layout == "one" else 2
        print(f"| {layout} | {run['error'] if 'error' in run else _cells(run, runs['one'], processes)} |")
    written = max((run["copied"] for run in runs.values() if "error" not in run), default=0)
    print(f"\nBeside checkpoints, no run wrote more than {written / 1e6:.1f} MB.\n", flush=True)
    failed = any("error" in run for run in runs.values())
    return failed or (resumed and _resume(base.with_name(f"{name}-TP2"), common, runs["one"]["losses"]))


def _cells(run: dict[str, Any], one: dict[str, Any], processes: int) -> str:
    compared = "error" not in one
    apart = max(abs(loss - one["losses"][step]) for step, loss in run["losses"].items()) if compared else float("nan")
    times = run["rate"] / one["rate"] if compared else float("nan")
    return (
        f"{next(iter(run['losses'].values())):.4f} | {apart:.4f} | {run['rate']:,.0f} "
        f"| {times:.2f} | {times / processes:.0%} | {run['peak']:.1f} "
        f"| {max(run['seconds']):.2f} | {', '.join(f'{each:,.1f}' for each in run['read'])}"
    )


def _resume(directory: Path, common: list[str], whole: dict[int, float]) -> bool:
    """Goes on at data parallel 2 with what was saved at tensor parallel 2; returns whether that failed."""
    more = [f"task.max_steps={STEPS + MORE}", "resume.allow_changes=[task.max_steps]"]
    run = Run(directory, f"hydra.run.dir='{directory}'", *common, *LAYOUTS["DP2"], *more)
    try:
        run.end()
    except RuntimeError as error:
        print(f"What was saved at TP2 did not go on at DP2: {error}\n", flush=True)
        return True
    ours = {line["step"]: line["train/loss"] for line in run.lines() if "train/loss" in line}
    print(f"Saved at TP2 after step {STEPS}, gone on with at DP2; in one process\n\n| step | loss | in one process |")
    print("|---:|---:|---:|")
    for step in range(STEPS - 1, STEPS + MORE + 1):
        print(f"| {step} | {ours[step]:.4f} | {whole[step]:.4f} |")
    print(flush=True)
    return False


def _compare_sweeps(base: Path, device: str, common: list[str]) -> bool:
    print("| trials on a GPU | seconds of the sweep | trials by GPU | most at once on one GPU |\n|---:|---:|---|---:|")
    failed = False
    for on_each in (1, 2):
        try:
            cells = _sweep(base / f"sweep-{on_each}", on_each, device, common)
        except RuntimeError as error:
            cells, failed = f"failed: {error} | | ", True
        print(f"| {on_each} | {cells} |", flush=True)
    return failed


def _sweep(directory: Path, on_each: int, device: str, common: list[str]) -> str:
    slots = f"trials_per_gpu={on_each}" if device == "cuda" else f"cpu_slots={2 * on_each}"
    said = [f"hydra.sweep.dir='{directory}'", *common, "peft=lora", f"hydra.launcher.{slots}", *SEVERAL]
    said += ["task.sequence_length=512" if device == "cuda" else "task.sequence_length=64", "task.max_steps=20"]
    started = time.monotonic()
    Run(directory, "-m", *said).end()
    seconds = time.monotonic() - started
    spans: dict[str, list[tuple[str, str]]] = {}
    for path in directory.glob("*/trial.json"):
        status = json.loads((path.parent / "status.json").read_text(encoding="utf-8"))
        where = ",".join(json.loads(path.read_text(encoding="utf-8"))["visible_devices"]) or "CPU"
        spans.setdefault(where, []).append((status["start"], status["end"]))
    most = max(_most_at_once(each) for each in spans.values())
    return f"{seconds:.0f} | {', '.join(f'{where}: {len(spans[where])}' for where in sorted(spans))} | {most}"


def _most_at_once(spans: list[tuple[str, str]]) -> int:
    """Of times as in status.json, to the second: one that begins in the second in which another ends comes after it."""
    return max(sum(start <= at < end for start, end in spans) for at, _ in spans)


if __name__ == "__main__":
    sys.exit(main())
