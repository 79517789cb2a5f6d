"""The terminal output of a run: a progress bar while it runs, and a summary at its end."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwen_cl.models.loading.base_adapter import BaseAdapter
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.metrics import BITS, LOSS, TARGET, MetricsTail, median_rate, read_curves, read_metrics
from qwen_cl.runs.status import RunStatus, WandbRecord

FILE_WIDTH = 240


class ProgressView:
    """The progress of a run, from metrics.jsonl and status.json: a bar, or on a pipe a line per tenth of the run."""

    def __init__(self, folder: RunFolder, max_steps: int, console: Console) -> None:
        """Show the run of ``folder`` on ``console``."""
        self.folder = folder
        self.max_steps = max_steps
        self.console = console
        self._tail = MetricsTail(folder)
        self._phase = ""
        self._next_line = 0
        self._latest: dict[str, Any] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("starting", total=max_steps)

    def __enter__(self) -> ProgressView:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self) -> None:
        """Show the records that were written since the last call."""
        for record in self._tail.new_records():
            self._latest.update(record)
        phase = self.folder.status().phase or "starting"
        step = self._latest.get("step", 0)
        text = _describe(self._latest) if "train/loss" in self._latest else phase
        self._progress.update(self._task, completed=step, description=text)
        if not self.console.is_terminal:
            self._print_line(phase, step, text)

    def _print_line(self, phase: str, step: int, text: str) -> None:
        phase, _, _ = phase.partition(":")  # a counter follows, and a line per count would be too many
        if phase != self._phase:
            self._phase = phase
            self.console.print(f"{phase} …", highlight=False)
        if "train/loss" in self._latest and step >= self._next_line:
            self._next_line = step + max(1, self.max_steps // 10)
            self.console.print(f"step {step}/{self.max_steps}  {text}", highlight=False)


def _describe(latest: dict[str, Any]) -> str:
    parts = [f"loss {latest['train/loss']:.3f}"]
    if (validation := f"{TARGET}/loss") in latest:
        parts.append(f"val {latest[validation]:.3f}")
    parts.append(f"{latest['throughput/tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


def _utilization(training: list[dict[str, Any]]) -> str:
    found = [record["throughput/mfu"] for record in training if "throughput/mfu" in record]
    return f", {statistics.median(found):.0%} of the device's peak" if found else ""


def print_result(folder: RunFolder, console: Console, seconds: float) -> None:
    """Print the summary of a completed run."""
    status, records = folder.status(), read_metrics(folder)
    training = [record for record in records if "train/loss" in record]
    lines = [
        ("state", f"{status.state} at step {status.step}"),
        *_measured(records),
        ("training loss", f"{training[0]['train/loss']:.4f} -> {training[-1]['train/loss']:.4f}"),
        ("time", f"{seconds:.0f} s, {median_rate(training):,.0f} tokens/s (median step){_utilization(training)}"),
        ("peak memory", f"{status.peak_memory_gib or 0.0:.2f} GiB"),
        ("folder", str(folder.directory)),
    ]
    lines += _next_commands(folder, status.wandb)
    print_facts(lines, console)


def _measured(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return a line for the validation set and each retention set, from the first evaluation to the last."""
    lines = []
    for loss, bits in zip(read_curves(records, LOSS), read_curves(records)):
        text = f"loss {loss.values[0]:.4f} at step {loss.steps[0]} -> {loss.values[-1]:.4f} at step {loss.steps[-1]}"
        if bits.unit == BITS:
            text += f", bits per byte {bits.values[0]:.3f} -> {bits.values[-1]:.3f}"
        lines.append(("validation" if loss.name == TARGET else f"retention {loss.name}", text))
    return lines


def console_for_tables(file: IO[str] | None = None) -> Console:
    """Return a console for tables, which rich would truncate at 80 columns in a file or a pipe."""
    console = Console(file=file)
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    return console


def print_facts(lines: list[tuple[str, str]], console: Console) -> None:
    """Print names and values, a line each."""
    for name, text in lines:
        console.print(f"{name:>18}  {text}", highlight=False, soft_wrap=True, markup=False)


def adapter_facts(adapter: BaseAdapter | None) -> list[tuple[str, str]]:
    """Return a line for ``model.adapter``, if there is one."""
    if adapter is None:
        return []
    modules = sorted({name.split(".")[-2] for name in adapter.factors})
    ranks = sorted({factors.rank for factors in adapter.factors.values()})
    details = f"rank {', '.join(map(str, ranks))}, on {', '.join(modules)}, sha256 {adapter.sha256[:12]}…"
    return [("merged adapter", f"{adapter.directory} ({details})")]


def _next_commands(folder: RunFolder, wandb: WandbRecord) -> list[tuple[str, str]]:
    lines = [("plot", str(folder.report))] if folder.report.exists() else []
    if folder.adapter.is_dir():
        lines.append(("adapter", f"peft.PeftModel.from_pretrained(model, {str(folder.adapter)!r})"))
    if wandb.url:
        lines.append(("W&B", wandb.url))
    if wandb.sync and wandb.directory:
        lines.append(("upload", wandb.sync))
        lines.append(("view locally", f"wandb leet {shlex.quote(str(Path(wandb.directory).parent))}"))
    return lines


def wandb_notice(status: RunStatus) -> str | None:
    """Return a line if W&B does not have all of the run, and None otherwise."""
    wandb = status.wandb
    if not wandb.reason:
        return None
    if not wandb.sync:
        return f"W&B: {wandb.reason}; nothing is logged to W&B, all metrics are in metrics.jsonl"
    effect = "logging offline" if wandb.mode == "offline" else "the upload is incomplete"
    return f"W&B: {wandb.reason}, {effect}; upload with: {wandb.sync}"
