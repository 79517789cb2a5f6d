"""Pictures of a sweep: every trial's loss, lr against rank, and what learning cost in forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_cl.continual.report import LOSS
from qwen_cl.data.named_sets import TARGET
from qwen_cl.sweep.results import Result, best_of, curves_of

RATE, RANK = "lr", "peft.rank"
MOST_IN_LEGEND = 20


def draw_sweep(directory: Path, results: Sequence[Result]) -> list[Path]:
    """Those that there is something to draw for; returns their files."""
    drawn = [
        _draw_curves(directory, results),
        _draw_heat_map(results, directory / "lr-rank.png"),
        _draw_pareto(results, directory / "pareto.png"),
    ]
    return [path for path in drawn if path is not None]


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """Completed trials that no other beats in one of target loss and forgetting without losing in the other; by
    target loss."""
    front: list[Result] = []
    for result in sorted(_measured(results), key=_objectives):
        if not front or _objectives(result)[1] < _objectives(front[-1])[1]:
            front.append(result)
    return front


def _measured(results: Sequence[Result]) -> list[Result]:
    return [one for one in results if one.completed and None not in (one.val_loss, one.forgotten)]


def _objectives(result: Result) -> tuple[float, float]:
    assert result.val_loss is not None and result.forgotten is not None
    return result.val_loss, result.forgotten


def _draw_curves(directory: Path, results: Sequence[Result]) -> Path | None:
    targets = [(one, curve) for one in results for curve in curves_of(directory, one) if curve.name == TARGET]
    if not targets:
        return None
    figure, axes = _figure()
    best = best_of(results)
    for number, (result, curve) in enumerate(targets):
        label = f"{result.name}: {curve.values[-1]:.3f}" + (", the best" if result is best else "")
        axes.plot(
            curve.steps,
            curve.values,
            "-" if result.completed else ":",
            color=f"C{number % 10}",
            linewidth=2.5 if result is best else 1.2,
            marker="o" if result.completed else "x",
            markersize=3,
            label=label if number < MOST_IN_LEGEND else None,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"{TARGET}/{LOSS} (nats per token)")
    axes.set_title("Validation loss of every trial (dotted: did not complete)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _save(figure, directory / "loss-curves.png")


def _draw_heat_map(results: Sequence[Result], path: Path) -> Path | None:
    """The lowest loss of each pair, where both were swept."""
    cells: dict[tuple[float, float], float] = {}
    for one in results:
        if one.completed and one.val_loss is not None and {RATE, RANK} <= one.differing.keys():
            cell = float(one.differing[RANK]), float(one.differing[RATE])
            cells[cell] = min(one.val_loss, cells.get(cell, one.val_loss))
    ranks, rates = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    if len(ranks) < 2 or len(rates) < 2:
        return None
    figure, axes = _figure()
    values = [[cells.get((rank, rate), float("nan")) for rank in ranks] for rate in rates]
    image = axes.imshow(values, cmap="viridis_r", origin="lower", aspect="auto")
    for row, rate in enumerate(rates):
        for column, rank in enumerate(ranks):
            text = f"{cells[rank, rate]:.3f}" if (rank, rate) in cells else "none"
            axes.annotate(text, (column, row), ha="center", va="center", fontsize=9, bbox={"fc": "white", "alpha": 0.7})
    axes.set_xticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
    axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_xlabel(RANK)
    axes.set_ylabel(RATE)
    axes.set_title("Validation loss by learning rate and rank (lower is better)", fontsize=10)
    figure.colorbar(image, ax=axes)
    return _save(figure, path)


def _draw_pareto(results: Sequence[Result], path: Path) -> Path | None:
    measured = _measured(results)
    if not measured:
        return None
    figure, axes = _figure()
    front = pareto_front(results)
    axes.scatter(*zip(*map(_objectives, measured)), color="C7", label="trials")
    axes.plot(*zip(*map(_objectives, front)), "o-", color="C3", label="Pareto front: nothing is better in both")
    for result in measured:
        axes.annotate(f" {result.name}", _objectives(result), fontsize=7)
    axes.margins(x=0.15)  # for the names
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel(f"target: {TARGET}/{LOSS} at the end")
    axes.set_ylabel("forgotten: mean rise of the retention sets' loss")
    axes.set_title("Learning against forgetting (left and low is better)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no display is looked for, and no state is kept

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    temporary.replace(path)
    return path
