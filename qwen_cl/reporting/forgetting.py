"""``report.png`` of a run: what it learnt against what it forgot, from its metrics.jsonl. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_cl.files.atomic import atomic_write
from qwen_cl.reporting.plot_text import drawable_text
from qwen_cl.runs.metrics import BITS, TARGET, Curve, read_curves


def draw_report(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """Two panels: every set by step, and the target against each retention set. Nothing where nothing was measured."""
    curves = read_curves(records)
    if not curves:
        return
    from matplotlib.figure import Figure  # no pyplot: no display is looked for, and no state is kept

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_step, against = figure.subplots(1, 2)
    _draw_by_step(by_step, curves)
    _draw_against(against, {"": curves})
    _save(figure, title, path)


def draw_comparison(runs: dict[str, list[Curve]], title: str, path: Path) -> None:
    """Three panels for several runs by name: the target by step, what should be kept by step, one against the other."""
    runs = {name: curves for name, curves in runs.items() if curves}
    if not runs:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    learnt, kept, against = figure.subplots(1, 3)
    for number, (name, curves) in enumerate(runs.items()):
        for curve in curves:
            axes, style = (learnt, "-") if curve.name == TARGET else (kept, "--")
            label = name if curve.name == TARGET else f"{name}: {curve.name}"
            axes.plot(curve.steps, curve.values, style, marker="o", markersize=3, color=f"C{number}", label=label)
    for axes, what in ((learnt, "Learnt: the target"), (kept, "Kept: the retention sets")):
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(_unit([curve for curves in runs.values() for curve in curves]))
        axes.set_title(f"{what} (lower is better)", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _draw_against(against, runs)
    _save(figure, title, path)


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=11)
    with atomic_write(path) as temporary, drawable_text(figure):
        figure.savefig(temporary, format="png", dpi=130)


def _draw_by_step(axes: Any, curves: list[Curve]) -> None:
    for number, curve in enumerate(curves):
        style = "-" if number == 0 else "--"
        label = f"{_title(curve, number)}: {curve.values[0]:.3f} to {curve.values[-1]:.3f}"
        axes.plot(curve.steps, curve.values, style, marker="o", markersize=3, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(_unit(curves))
    axes.set_title("Learning and forgetting (lower is better)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_against(axes: Any, runs: dict[str, list[Curve]]) -> None:
    number = 0
    for run, (target, *kept) in runs.items():
        learnt = [target.values[0] - value for value in target.values]
        for curve in kept:
            forgotten = [value - curve.values[0] for value in curve.values]
            label = ": ".join(filter(None, (run, curve.name)))
            axes.plot(
                learnt, forgotten, marker="o", markersize=3, color=f"C{number if run else number + 1}", label=label
            )
            axes.annotate(f"step {curve.steps[-1]}", (learnt[-1], forgotten[-1]), fontsize=8)
            number += not run
        number += bool(run)
    if not any(kept for _, *kept in runs.values()):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no retention sets: forgetting was not measured", ha="center", va="center")
        return
    unit = _unit([curve for curves in runs.values() for curve in curves])
    axes.margins(x=0.15)  # for the annotations
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel(f"learnt: fall of the target's {unit}")
    axes.set_ylabel(f"forgotten: rise of {unit}")
    axes.set_title("What learning cost (right and low is better)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _title(curve: Curve, number: int) -> str:
    return f"{'target' if number == 0 else 'retention'} {'' if number == 0 else curve.name}".strip()


def _unit(curves: list[Curve]) -> str:
    return "bits per byte" if all(curve.unit == BITS for curve in curves) else "loss (nats per token)"
