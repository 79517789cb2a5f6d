"""Learning and forgetting per stage, from each stage's own metrics: a table, ``comparison.json`` and ``report.png``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from qwen_cl.continual.stages import Stage
from qwen_cl.reporting.forgetting import draw_comparison
from qwen_cl.runs.metrics import BITS, TARGET, Curve, read_curves, read_metrics

NAME_WIDTH = 18


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one set's loss in one stage."""

    stage: str
    set: str
    unit: str
    """``bits_per_byte``, or ``loss`` for a set without text."""
    before: float
    after: float

    @property
    def change(self) -> float:
        """The increase of the loss: above 0 is worse."""
        return self.after - self.before


def write_comparison(stages: Sequence[Stage], directory: Path, console: Console) -> None:
    """Print and write the changes of every stage; the figure is drawn if a stage has validated."""
    curves = {stage.name: read_curves(read_metrics(stage.folder)) for stage in stages}
    changes = [
        Change(name, "target" if curve.name == TARGET else curve.name, curve.unit, curve.values[0], curve.values[-1])
        for name, stage_curves in curves.items()
        for curve in stage_curves
    ]
    records = [{**asdict(change), "change": change.change} for change in changes]
    (directory / "comparison.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    _print_table(changes, curves, console)
    draw_comparison(curves, directory.name, directory / "report.png")


def _print_table(changes: Sequence[Change], curves: dict[str, list[Curve]], console: Console) -> None:
    sets = list(dict.fromkeys(change.set for change in changes))
    width = max(NAME_WIDTH, *(len(name) + 2 for name in curves))
    heading = "stage".ljust(width) + "".join(f"{name:>34}" for name in sets)
    console.print("\n" + heading, highlight=False, soft_wrap=True, markup=False)
    for name in curves:
        by_set = {change.set: change for change in changes if change.stage == name}
        cells = "".join(_cell(by_set.get(set_name)) for set_name in sets)
        console.print(name.ljust(width) + cells, highlight=False, soft_wrap=True, markup=False)
    unit = "Bits per byte" if all(change.unit == BITS for change in changes) else "Bits per byte, or loss without text,"
    console.print(f"{unit} before and after each stage; lower is better.\n", highlight=False, soft_wrap=True)


def _cell(change: Change | None) -> str:
    if change is None:
        return f"{'-':>34}"
    text = f"{change.before:.3f} -> {change.after:.3f} ({change.change:+.3f})"
    return f"{text:>34}"
