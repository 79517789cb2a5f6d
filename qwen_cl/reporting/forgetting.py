"""The plot ``report.png`` of a run: learning and forgetting, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_cl.files.atomic import atomic_write
from qwen_cl.reporting.plot_text import drawable_text
from qwen_cl.runs.metrics import BITS, TARGET, Curve, read_curves


def draw_report(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw two panels: every set by step, and the target against each retention set; nothing without an evaluation."""
    curves = read_curves(records)
    if not curves:
        return
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps global state

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_step, against = figure.subplots(1, 2)
    _draw_by_step(by_step, curves)
    _draw_against(against, {"": curves})
    _save(figure, title, path)


def draw_comparison(runs: dict[str, list[Curve]], title: str, path: Path) -> None:
    """Draw three panels for runs by name: the target by step, the retention sets by step, one against the other."""
    runs = {name: curves for name, curves in runs.items() if curves}
    if not runs:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    learning, retention, against = figure.subplots(1, 3)
    for number, (name, curves) in enumerate(runs.items()):
        for curve in curves:
            axes, style = (learning, "-") if curve.name == TARGET else (retention, "--")
            label = name if curve.name == TARGET else f"{name}: {curve.name}"
            axes.plot(curve.steps, curve.values, style, marker="o", markersize=3, color=f"C{number}", label=label)
    for axes, title_text in ((learning, "Target set"), (retention, "Retention sets")):
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(_unit([curve for curves in runs.values() for curve in curves]))
        axes.set_title(f"{title_text} (lower is better)", fontsize=10)
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
    for run, (target, *retention) in runs.items():
        learned = [target.values[0] - value for value in target.values]
        for curve in retention:
            forgetting = [value - curve.values[0] for value in curve.values]
            label = ": ".join(filter(None, (run, curve.name)))
            axes.plot(
                learned, forgetting, marker="o", markersize=3, color=f"C{number if run else number + 1}", label=label
            )
            axes.annotate(f"step {curve.steps[-1]}", (learned[-1], forgetting[-1]), fontsize=8)
            number += not run
        number += bool(run)
    if not any(retention for _, *retention in runs.values()):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no retention sets: forgetting was not evaluated", ha="center", va="center")
        return
    unit = _unit([curve for curves in runs.values() for curve in curves])
    axes.margins(x=0.15)  # for the annotations
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xlabel(f"learning: decrease of the target's {unit}")
    axes.set_ylabel(f"forgetting: increase of {unit}")
    axes.set_title("Learning versus forgetting (lower right is better)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _title(curve: Curve, number: int) -> str:
    return f"{'target' if number == 0 else 'retention'} {'' if number == 0 else curve.name}".strip()


def _unit(curves: list[Curve]) -> str:
    return "bits per byte" if all(curve.unit == BITS for curve in curves) else "loss (nats per token)"
