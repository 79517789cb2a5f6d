"""The tables that an evaluation prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from qwen_cl.inference.loss import SetLoss


def print_losses(losses: Mapping[str, SetLoss], console: Console) -> None:
    """Print the losses, a row per set."""
    if not losses:
        return
    table = _table("set", "rows", "tokens", "bytes", "loss", "perplexity", "bits per byte")
    for name, loss in losses.items():
        counts = (f"{count:,}" for count in (loss.rows, loss.tokens, loss.num_bytes))
        table.add_row(name, *counts, f"{loss.loss:.4f}", f"{loss.perplexity:,.2f}", f"{loss.bits_per_byte:.4f}")
    console.print(table)


def print_scores(scores: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print the metrics of lm-evaluation-harness by task."""
    if not scores:
        return
    table = _table("lm_eval task", "metric", "value")
    for task, metrics in scores.items():
        for name, value in metrics.items():
            table.add_row(task, name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def print_samples(samples: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print every prompt with its answers: of the trained model, and of the base model before training."""
    if not samples:
        return
    columns = ("before", "after") if "before" in samples[0] else ("after",)
    table = Table(show_lines=True)
    for name in ("prompt", *columns):
        table.add_column(name, overflow="fold", ratio=1)
    for sample in samples:
        prompt = sample["prompt"] if "prompt" in sample else sample["messages"][-1]["content"]
        table.add_row(_plain(prompt), *(_plain(sample[column]) for column in columns))
    console.print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # not parsed as rich markup


def _table(*columns: str) -> Table:
    table = Table()
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table
