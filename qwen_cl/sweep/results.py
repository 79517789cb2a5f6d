"""The results of a sweep: a table of its trials, the best one, and the cost."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwen_cl.reporting.console import print_facts
from qwen_cl.reporting.run_summary import read_measurements
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.metrics import LOSS, TARGET
from qwen_cl.runs.status import State
from qwen_cl.sweep.trial import RECORD, read_record, read_records, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of one trial."""

    number: int
    name: str
    state: str
    reason: str | None
    overrides: list[str]
    differing: dict[str, str]
    step: int
    max_steps: int
    attempts: int
    seconds: float
    """Wall-clock seconds of all attempts, including startup."""
    gpu_seconds: float
    val_loss: float | None
    """At the last validation."""
    first_val_loss: float | None
    train_loss: float | None
    """Training loss of the last step."""
    retention: dict[str, float | None]
    """Loss of each retention set at the last validation."""
    forgetting: float | None
    """Mean increase of the retention sets' losses since step 0."""
    tokens_per_second: float | None
    """Throughput of the median step."""
    peak_memory_gib: float | None

    @property
    def completed(self) -> bool:
        """True if the run completed."""
        return self.state == State.COMPLETED.value


def read_results(directory: Path) -> list[Result]:
    """Read the results of every trial in a sweep's folder, sorted: completed trials first, by validation loss."""
    results = [read_result(directory / record["name"]) for record in read_records(directory)]
    worst = float("inf")
    return sorted(results, key=lambda one: (not one.completed, worst if one.val_loss is None else one.val_loss))


def read_result(directory: Path) -> Result:
    """Read the result of a trial that was started."""
    record, measured = read_record(directory / RECORD), read_measurements(RunFolder(directory))
    status = measured.status
    never_started = f"it never started; see {directory / 'launch.log'}"
    return Result(
        **{name: record[name] for name in ("number", "name", "overrides", "differing", "max_steps", "attempts")},
        seconds=record["seconds"],
        gpu_seconds=record["gpu_seconds"],
        state=(status.state or State.FAILED).value,
        reason=never_started if status.state is None else status.reason,
        step=status.step,
        val_loss=measured.loss,
        first_val_loss=measured.first_loss,
        train_loss=measured.train_loss,
        retention=measured.retention_losses,
        forgetting=measured.forgetting,
        tokens_per_second=measured.tokens_per_second,
        peak_memory_gib=status.peak_memory_gib,
    )


def write_results(directory: Path, results: Sequence[Result], facts: dict[str, Any]) -> None:
    """Write ``sweep.json`` with all details, and ``sweep.csv`` for a spreadsheet."""
    best = best_of(results)
    summary = {**facts, "objective": f"{TARGET}/{LOSS}", "best": None if best is None else best.name}
    write_json({**summary, "results": [asdict(result) for result in results]}, directory / "sweep.json")
    rows = [_row(result) for result in results]
    names = dict.fromkeys(name for row in rows for name in row)
    with (directory / "sweep.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(names), restval="")
        writer.writeheader()
        writer.writerows(rows)


def best_of(results: Sequence[Result]) -> Result | None:
    """Return the first of sorted results, or None if none completed with a validation loss."""
    return results[0] if results and results[0].completed and results[0].val_loss is not None else None


def print_results(results: Sequence[Result], facts: Sequence[tuple[str, str]], console: Console) -> None:
    """Print the table of trials, the trials that did not complete, the best trial, and ``facts``."""
    console.print(_table(results), highlight=False)
    for result in results:
        if not result.completed:
            console.print(
                f"{result.name}: {result.state}, {result.reason}", highlight=False, soft_wrap=True, markup=False
            )
    print_facts([*_verdict(results), *facts], console)


def _row(result: Result) -> dict[str, Any]:
    fields = asdict(result)
    differing, retention, overrides = fields.pop("differing"), fields.pop("retention"), fields.pop("overrides")
    losses = {f"retention/{name}/{LOSS}": value for name, value in retention.items()}
    return {**fields, **differing, **losses, "overrides": " ".join(overrides)}


def _table(results: Sequence[Result]) -> Table:
    keys = dict.fromkeys(key for result in results for key in result.differing)
    costs_gpu = any(result.gpu_seconds for result in results)
    table = Table(box=None, header_style="bold")
    for name in ("", "trial", "state"):
        table.add_column(name)
    figures = ("val loss", "+", "forgetting", "train loss", "tokens/s", "GiB", "s", *(("GPU-s",) if costs_gpu else ()))
    for name in (*keys, *figures):
        table.add_column(name, justify="right")
    best = best_of(results)
    for result in results:
        behind = None if best is None or result.val_loss is None else result.val_loss - (best.val_loss or 0.0)
        row = [
            "*" if result is best else "",
            f"{result.number:02}",
            result.state,
            *(result.differing.get(key, "") for key in keys),
            _figure(result.val_loss, ".4f"),
            "" if result is best else _figure(behind, ".4f"),
            _figure(result.forgetting, "+.4f"),
            _figure(result.train_loss, ".4f"),
            _figure(result.tokens_per_second, ",.0f"),
            _figure(result.peak_memory_gib, ".2f"),
            f"{result.seconds:.0f}",
        ]
        table.add_row(*row, *([f"{result.gpu_seconds:.0f}"] if costs_gpu else []))
    return table


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _verdict(results: Sequence[Result]) -> list[tuple[str, str]]:
    best = best_of(results)
    if best is None or best.val_loss is None:
        return [("best", "none: no trial completed with a validation loss")]
    text = f"{best.name}, validation loss {best.val_loss:.4f}"
    second = next((one for one in results[1:] if one.completed and one.val_loss is not None), None)
    if second is not None and second.val_loss is not None:
        behind = second.val_loss - best.val_loss
        text += f", {behind:.4f} ({behind / second.val_loss:.1%}) below the second best, {second.name}"
    return [("best", text), ("overrides", " ".join(best.overrides))]
