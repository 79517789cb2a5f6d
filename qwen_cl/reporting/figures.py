"""The plots of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from qwen_cl.reporting.importance import importances
from qwen_cl.reporting.plot_text import drawable_text
from qwen_cl.reporting.run_summary import RunSummary, differing, number

RATE, RANK = "lr", "peft.rank"
MAX_LEGEND_ENTRIES = 20


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot as a PNG image."""

    name: str
    """Name of its file, without suffix."""
    title: str
    png: bytes
    caption: str
    """Text alternative, for readers without images: many mail programs show none."""


def draw_plots(trials: Sequence[RunSummary]) -> list[Plot]:
    """Draw the plots for which there is data. ``trials`` are sorted, the best first."""
    drawn = [_loss_curves(trials), _training_curves(trials), _retention_curves(trials)]
    if len(trials) > 1:
        drawn += [_parallel_coordinates(trials), _importance(trials), _heat_map(trials), _pareto(trials)]
    return [plot for plot in drawn if plot is not None]


def pareto_front(trials: Sequence[RunSummary]) -> list[RunSummary]:
    """Return the completed trials on the Pareto front of target loss and forgetting, sorted by loss."""
    front: list[RunSummary] = []
    for trial in sorted(_with_forgetting(trials), key=_objectives):
        if not front or _objectives(trial)[1] < _objectives(front[-1])[1]:
            front.append(trial)
    return front


def _with_forgetting(trials: Sequence[RunSummary]) -> list[RunSummary]:
    return [trial for trial in trials if trial.completed and trial.forgetting is not None]


def _objectives(trial: RunSummary) -> tuple[float, float]:
    assert trial.loss is not None and trial.forgetting is not None
    return trial.loss, trial.forgetting


def _completed(trials: Sequence[RunSummary]) -> tuple[list[RunSummary], list[float]]:
    done = [trial for trial in trials if trial.completed]
    return done, [trial.loss for trial in done if trial.loss is not None]


def _loss_curves(trials: Sequence[RunSummary]) -> Plot | None:
    lines = [(trial, trial.target.steps, trial.target.values) for trial in trials if trial.target]
    if not lines:
        return None
    axes = _lines(lines, "nats per token")
    best, _, values = lines[0]
    caption = f"Best: {best.name}, {values[0]:.4f} at the start and {values[-1]:.4f} at the end."
    return _render("loss-curves", "Validation loss", axes, caption)


def _training_curves(trials: Sequence[RunSummary]) -> Plot | None:
    lines = [
        (trial, [step for step, _ in trial.training], [loss for _, loss in trial.training])
        for trial in trials
        if trial.training
    ]
    if not lines:
        return None
    caption = "; ".join(f"{trial.name} ends at {values[-1]:.4f}" for trial, _, values in lines[:MAX_LEGEND_ENTRIES])
    return _render("training-curves", "Training loss", _lines(lines, "nats per token"), caption)


def _retention_curves(trials: Sequence[RunSummary]) -> Plot | None:
    """Draw the increase of the loss since step 0 for every trial and retention set."""
    lines = [
        (trial, curve.steps, [value - curve.values[0] for value in curve.values])
        for trial in trials
        for curve in trial.retention
    ]
    if not lines:
        return None
    sets = ", ".join(dict.fromkeys(curve.name for trial in trials for curve in trial.retention))
    axes = _lines(lines, "increase of the loss since step 0")
    axes.axhline(0, color="gray", linewidth=0.8)
    return _render("forgetting", f"Forgetting: {sets}", axes, "Above 0 the model is worse than before training.")


def _lines(lines: Sequence[tuple[RunSummary, list[int], list[float]]], unit: str) -> Any:
    axes = _axes()
    trials = list(dict.fromkeys(trial.name for trial, _, _ in lines))
    for trial, steps, values in lines:
        index = trials.index(trial.name)
        axes.plot(
            steps,
            values,
            "-" if trial.completed else ":",
            color=f"C{index % 10}",
            linewidth=2.2 if index == 0 else 1.2,
            marker="o" if len(steps) < 20 else None,
            markersize=3,
            label=trial.name if index < MAX_LEGEND_ENTRIES else None,
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.legend(fontsize=7)
    return axes


def _parallel_coordinates(trials: Sequence[RunSummary]) -> Plot | None:
    done, losses = _completed(trials)
    keys = differing(done)
    if len(done) < 2 or not keys:
        return None
    columns: dict[str, list[Any]] = {key: [trial.overrides.get(key, "unset") for trial in done] for key in keys}
    columns["target loss"] = losses
    if len(_with_forgetting(done)) == len(done):
        columns["forgetting"] = [trial.forgetting for trial in done]
    axes = _axes()
    positions = [_label_column(axes, column, values) for column, values in enumerate(columns.values())]
    for row in reversed(range(len(done))):
        heights, rank = [column[row] for column in positions], row / max(1, len(done) - 1)
        axes.plot(range(len(columns)), heights, color=_color(rank), linewidth=2.5 - rank)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks([])
    axes.grid(visible=False)
    for column in range(len(columns)):
        axes.axvline(column, color="gray", linewidth=0.8)
    caption = "Each line is a trial; darker lines have a lower target loss. The table has the values."
    return _render("parallel-coordinates", "Parallel coordinates", axes, caption)


def _label_column(axes: Any, column: int, values: Sequence[Any]) -> list[float]:
    """Write the values of a column beside it, and return their heights from 0 to 1.

    Settings are spaced evenly, results to scale.
    """
    if all(isinstance(value, float) for value in values):
        low, high = min(values), max(values)
        heights = [(value - low) / ((high - low) or 1.0) for value in values]
        labels = {0.0: f"{low:.4g}", 1.0: f"{high:.4g}"}
    else:
        texts = sorted(set(values), key=lambda text: (number(text) is None, number(text) or 0.0, text))
        heights = [texts.index(value) / max(1, len(texts) - 1) for value in values]
        labels = {index / max(1, len(texts) - 1): text for index, text in enumerate(texts)}
    for height, text in labels.items():
        axes.annotate(text, (column, height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    return heights


def _importance(trials: Sequence[RunSummary]) -> Plot | None:
    done, losses = _completed(trials)
    found = importances(done, losses)
    if not found:
        return None
    axes = _axes()
    axes.barh([each.key for each in found][::-1], [each.strength for each in found][::-1], color="C0")
    axes.set_xlim(0, 1)
    axes.set_xlabel("rank correlation with the target loss")
    caption = "; ".join(f"{each.key} {each.strength:.2f} ({each.direction})" for each in found)
    caveat = f" With only {len(done)} trials, high values may be chance." if len(done) < 10 else ""
    return _render("importance", "Parameter importance", axes, f"{caption}.{caveat}")


def _heat_map(trials: Sequence[RunSummary]) -> Plot | None:
    """Draw the lowest loss for each pair of learning rate and rank, if both were varied."""
    cells: dict[tuple[float, float], float] = {}
    for trial in _completed(trials)[0]:
        rate, rank = number(trial.overrides.get(RATE)), number(trial.overrides.get(RANK))
        if rate is not None and rank is not None and trial.loss is not None:
            cells[rate, rank] = min(trial.loss, cells.get((rate, rank), trial.loss))
    rates, ranks = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    if len(rates) < 2 or len(ranks) < 2:
        return None
    axes = _axes()
    image = axes.imshow(
        [[cells.get((rate, rank), float("nan")) for rank in ranks] for rate in rates],
        cmap="viridis_r",
        origin="lower",
        aspect="auto",
    )
    for (rate, rank), loss in cells.items():
        cell = ranks.index(rank), rates.index(rate)
        axes.annotate(f"{loss:.4f}", cell, ha="center", va="center", bbox={"fc": "white", "alpha": 0.75, "lw": 0})
    axes.grid(visible=False)
    axes.set_xticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
    axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_xlabel(RANK)
    axes.set_ylabel(RATE)
    axes.figure.colorbar(image, ax=axes)
    (rate, rank), loss = min(cells.items(), key=lambda cell: cell[1])
    caption = f"Lowest: {loss:.4f} at lr {rate:g}, rank {rank:g}."
    return _render("lr-rank", "Target loss by learning rate and rank", axes, caption)


def _pareto(trials: Sequence[RunSummary]) -> Plot | None:
    evaluated, front = _with_forgetting(trials), pareto_front(trials)
    if len(evaluated) < 2:
        return None
    axes = _axes()
    axes.scatter(*zip(*map(_objectives, evaluated)), color="C7", label="trials")
    axes.plot(*zip(*map(_objectives, front)), "o-", color="C3", label="Pareto front")
    for trial in evaluated:
        axes.annotate(trial.name, _objectives(trial), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("final target loss")
    axes.set_ylabel("forgetting: mean increase of the retention sets' loss")
    axes.legend(fontsize=8)
    caption = f"Pareto front, from the lowest target loss to the least forgetting: {', '.join(t.name for t in front)}."
    return _render("pareto", "Learning versus forgetting (lower left is better)", axes, caption)


def _axes() -> Any:
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps global state

    axes: Any = Figure(figsize=(7.5, 4.2), layout="constrained").subplots()
    axes.grid(alpha=0.3)
    return axes


def _color(rank: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * rank)


def _render(name: str, title: str, axes: Any, caption: str) -> Plot:
    stream = BytesIO()
    with drawable_text(axes.figure):
        axes.figure.savefig(stream, format="png", dpi=110)
    return Plot(name, title, stream.getvalue(), caption)
