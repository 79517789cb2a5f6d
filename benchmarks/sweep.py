"""Compare a sweep with concurrent trials with the same sweep run sequentially.

``python benchmarks/sweep.py [--device cuda|cpu] [--at-once N] [--steps N]`` runs six trials, two learning rates by
three ranks. On a GPU, LoRA on Qwen2.5-0.5B with random weights and random tokens; on a CPU, the bundled demo model on
the demo data. Prints a Markdown table of the seconds of the whole sweep, the tokens per second of all trials together
(over the sweep, and while any trial trains), and the peak memory of the device.
"""

from __future__ import annotations

import argparse
import json
import os
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

from benchmarks.arguments import default_device, existing_device, machine, positive  # noqa: E402

GRID = ["lr=1e-4,3e-4", "peft.rank=8,16,32"]
TRIALS = 6
ON_GPU = ["task.sequence_length=2048", "task.global_batch_size=8", "task.micro_batch_size=2", "data.rows=64"]
SAMPLE_SECONDS = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--at-once", type=positive, help="concurrent trials; default 3 on a GPU, 2 on a CPU")
    parser.add_argument("--steps", type=positive, default=20, help="steps per trial")
    arguments = parser.parse_args()
    from benchmarks.load import SHAPES, write_model

    device = arguments.device or default_device()
    at_once = arguments.at_once or (3 if device == "cuda" else 2)
    with tempfile.TemporaryDirectory(prefix="sweep-") as temporary:
        base = Path(temporary)
        overrides = ["model=tiny"]
        if device == "cuda":
            write_model(base / "model", SHAPES["0.5b"])
            overrides = ["model=local", f"model.source='{base / 'model'}'", "data=mock", "retention=none", *ON_GPU]
        results = {
            count: _sweep(base / f"at-once-{count}", count, device, arguments.steps, overrides)
            for count in (1, at_once)
        }
    _print(results, device)
    return 0


def _sweep(directory: Path, at_once: int, device: str, steps: int, overrides: list[str]) -> dict[str, Any]:
    print(f"{TRIALS} trials, {at_once} concurrently …", file=sys.stderr, flush=True)
    slots = f"hydra.launcher.trials_per_gpu={at_once}" if device == "cuda" else f"hydra.launcher.cpu_slots={at_once}"
    accelerator = "gpu" if device == "cuda" else "cpu"
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "-m",
        *GRID,
        *overrides,
        slots,
        f"hydra.sweep.dir='{directory}'",
    ]
    command += [f"cluster.accelerator={accelerator}", "wandb.mode=disabled", "task.sample_prompts=0"]
    command += [f"task.max_steps={steps}", "task.warmup_steps=1", "task.log_interval=1"]
    command += [f"task.val_check_interval={steps}", f"task.checkpoint_interval={steps}"]
    watch = DeviceWatch(device)
    started = time.monotonic()
    with watch:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return {"seconds": seconds, "memory": watch.bytes, **_figures(directory)}


def _figures(directory: Path) -> dict[str, Any]:
    records = [
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in directory.glob("*/metrics.jsonl")
    ]
    assert len(records) == TRIALS, f"{len(records)} of {TRIALS} trials"
    training = [[line for line in lines if "train/loss" in line] for lines in records]
    tokens = [lines[-1]["tokens"] for lines in training]
    # A line is written at the end of its step. The first step includes warmup and is left out of the rate.
    rates = [statistics.median(line["throughput/tokens_per_second"] for line in lines[1:]) for lines in training]
    spans = [(lines[0]["time"], lines[-1]["time"]) for lines in training]
    trained = [all_ - lines[0]["tokens"] for all_, lines in zip(tokens, training)]
    return {"tokens": sum(tokens), "trained": sum(trained), "busy": _covered(spans), "rate": statistics.median(rates)}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the seconds that at least one span covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class DeviceWatch:
    """The peak memory and utilization of the first visible GPU over all processes, as the driver reports them."""

    def __init__(self, device: str) -> None:
        self.bytes = 0
        self._busy: list[tuple[float, int]] = []
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def busy_between(self, start: float, seconds: list[float]) -> float | None:
        """Return the fraction of time in which a kernel ran, from ``start`` (``time.time()``); None without a GPU."""
        found = [share for when, share in self._busy if start <= when <= start + sum(seconds)]
        return statistics.mean(found) / 100 if found else None

    def _sample(self) -> None:
        if self._device != "cuda":
            return
        import pynvml

        pynvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        by_index = pynvml.nvmlDeviceGetHandleByIndex
        handle = by_index(int(first)) if first.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(first)
        while not self._done.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            self._busy.append((time.time(), pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))


def _print(results: dict[int, dict[str, Any]], device: str) -> None:
    print(f"{TRIALS} trials of LoRA on {machine(device)}\n")
    print(
        "| concurrent trials | seconds | tokens/s, whole sweep | tokens/s, while training | tokens/s, one trial | GiB |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    for at_once, result in results.items():
        memory = f"{result['memory'] / 2**30:.1f}" if result["memory"] else "-"
        print(
            f"| {at_once} | {result['seconds']:.0f} | {result['tokens'] / result['seconds']:,.0f} "
            f"| {result['trained'] / result['busy']:,.0f} | {result['rate']:,.0f} | {memory} |"
        )
    first, last = results.values()
    print(f"\n{last['seconds'] / first['seconds']:.2f} times the duration of the sequential sweep")


if __name__ == "__main__":
    sys.exit(main())
