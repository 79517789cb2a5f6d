"""The pictures of the page, each drawn where there is something to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from qwen_cl.reporting.importance import importances
from qwen_cl.reporting.plot_text import drawable_text
from qwen_cl.reporting.run_summary import RunSummary, differing, number

RATE, RANK = "lr", "peft.rank"
MOST_IN_LEGEND = 20


@dataclass(frozen=True, slots=True)
class Picture:
    name: str
    """Of its file, where it is written as one."""
    title: str
    png: bytes
    says: str
    """The same in words, for who sees no pictures: many mail programs show none."""


def pictures(trials: Sequence[RunSummary]) -> list[Picture]:
    """``trials`` are sorted, the best first."""
    drawn = [_loss_curves(trials), _training_curves(trials), _retention_curves(trials)]
    if len(trials) > 1:
        drawn += [_parallel_coordinates(trials), _importance(trials), _heat_map(trials), _pareto(trials)]
    return [picture for picture in drawn if picture is not None]


def pareto_front(trials: Sequence[RunSummary]) -> list[RunSummary]:
    """Completed trials that none beats in one of target loss and forgetting without losing in the other; by loss."""
    front: list[RunSummary] = []
    for trial in sorted(_weighed(trials), key=_objectives):
        if not front or _objectives(trial)[1] < _objectives(front[-1])[1]:
            front.append(trial)
    return front


def _weighed(trials: Sequence[RunSummary]) -> list[RunSummary]:
    return [trial for trial in trials if trial.completed and trial.forgetting is not None]


def _objectives(trial: RunSummary) -> tuple[float, float]:
    assert trial.loss is not None and trial.forgetting is not None
    return trial.loss, trial.forgetting


def _completed(trials: Sequence[RunSummary]) -> tuple[list[RunSummary], list[float]]:
    done = [trial for trial in trials if trial.completed]
    return done, [trial.loss for trial in done if trial.loss is not None]


def _loss_curves(trials: Sequence[RunSummary]) -> Picture | None:
    lines = [(trial, trial.target.steps, trial.target.values) for trial in trials if trial.target]
    if not lines:
        return None
    axes = _lines(lines, "nats per token")
    best, _, values = lines[0]
    says = f"Best at the end: {best.name}, {values[0]:.4f} at the start and {values[-1]:.4f} at the end."
    return _picture("loss-curves", "Validation loss of the target", axes, says)


def _training_curves(trials: Sequence[RunSummary]) -> Picture | None:
    lines = [
        (trial, [step for step, _ in trial.training], [loss for _, loss in trial.training])
        for trial in trials
        if trial.training
    ]
    if not lines:
        return None
    says = "; ".join(f"{trial.name} ends at {values[-1]:.4f}" for trial, _, values in lines[:MOST_IN_LEGEND])
    return _picture("training-curves", "Training loss", _lines(lines, "nats per token"), says)


def _retention_curves(trials: Sequence[RunSummary]) -> Picture | None:
    """Rise of the loss since step 0, of every trial and set."""
    lines = [
        (trial, curve.steps, [value - curve.values[0] for value in curve.values])
        for trial in trials
        for curve in trial.retention
    ]
    if not lines:
        return None
    sets = ", ".join(dict.fromkeys(curve.name for trial in trials for curve in trial.retention))
    axes = _lines(lines, "rise of the loss since step 0")
    axes.axhline(0, color="grey", linewidth=0.8)
    return _picture("forgetting", f"Forgetting: {sets}", axes, "Above 0 the model is worse at what it knew before.")


def _lines(lines: Sequence[tuple[RunSummary, list[int], list[float]]], unit: str) -> Any:
    axes = _axes()
    trials = list(dict.fromkeys(trial.name for trial, _, _ in lines))
    for trial, steps, values in lines:
        place = trials.index(trial.name)
        axes.plot(
            steps,
            values,
            "-" if trial.completed else ":",
            color=f"C{place % 10}",
            linewidth=2.2 if place == 0 else 1.2,
            marker="o" if len(steps) < 20 else None,
            markersize=3,
            label=trial.name if place < MOST_IN_LEGEND else None,
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.legend(fontsize=7)
    return axes


def _parallel_coordinates(trials: Sequence[RunSummary]) -> Picture | None:
    done, losses = _completed(trials)
    keys = differing(done)
    if len(done) < 2 or not keys:
        return None
    columns: dict[str, list[Any]] = {key: [trial.overrides.get(key, "unset") for trial in done] for key in keys}
    columns["target loss"] = losses
    if len(_weighed(done)) == len(done):
        columns["forgotten"] = [trial.forgetting for trial in done]
    axes = _axes()
    placed = [_placed(axes, column, values) for column, values in enumerate(columns.values())]
    for row in reversed(range(len(done))):
        heights, place = [column[row] for column in placed], row / max(1, len(done) - 1)
        axes.plot(range(len(columns)), heights, color=_colour(place), linewidth=2.5 - place)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks([])
    axes.grid(visible=False)
    for column in range(len(columns)):
        axes.axvline(column, color="grey", linewidth=0.8)
    says = "A line is a trial, the darker the lower its target loss; the table has the values."
    return _picture("parallel-coordinates", "Parallel coordinates", axes, says)


def _placed(axes: Any, column: int, values: Sequence[Any]) -> list[float]:
    """Heights from 0 to 1, with the values written beside: settings evenly apart, results to scale."""
    if all(isinstance(value, float) for value in values):
        low, high = min(values), max(values)
        heights = [(value - low) / ((high - low) or 1.0) for value in values]
        shown = {0.0: f"{low:.4g}", 1.0: f"{high:.4g}"}
    else:
        texts = sorted(set(values), key=lambda text: (number(text) is None, number(text) or 0.0, text))
        heights = [texts.index(value) / max(1, len(texts) - 1) for value in values]
        shown = {index / max(1, len(texts) - 1): text for index, text in enumerate(texts)}
    for height, text in shown.items():
        axes.annotate(text, (column, height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    return heights


def _importance(trials: Sequence[RunSummary]) -> Picture | None:
    done, losses = _completed(trials)
    found = importances(done, losses)
    if not found:
        return None
    axes = _axes()
    axes.barh([each.key for each in found][::-1], [each.strength for each in found][::-1], color="C0")
    axes.set_xlim(0, 1)
    axes.set_xlabel("rank correlation with the target loss (1: decides it)")
    says = "; ".join(f"{each.key} {each.strength:.2f} ({each.direction})" for each in found)
    few = f" Of {len(done)} trials: chance alone gives large values to few." if len(done) < 10 else ""
    return _picture("importance", "Importance of what was varied", axes, f"{says}.{few}")


def _heat_map(trials: Sequence[RunSummary]) -> Picture | None:
    """The lowest loss of each pair, where both were varied."""
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
        place = ranks.index(rank), rates.index(rate)
        axes.annotate(f"{loss:.4f}", place, ha="center", va="center", bbox={"fc": "white", "alpha": 0.75, "lw": 0})
    axes.grid(visible=False)
    axes.set_xticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
    axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_xlabel(RANK)
    axes.set_ylabel(RATE)
    axes.figure.colorbar(image, ax=axes)
    (rate, rank), loss = min(cells.items(), key=lambda cell: cell[1])
    says = f"Lowest: {loss:.4f} at lr {rate:g}, rank {rank:g}."
    return _picture("lr-rank", "Target loss by learning rate and rank", axes, says)


def _pareto(trials: Sequence[RunSummary]) -> Picture | None:
    weighed, front = _weighed(trials), pareto_front(trials)
    if len(weighed) < 2:
        return None
    axes = _axes()
    axes.scatter(*zip(*map(_objectives, weighed)), color="C7", label="trials")
    axes.plot(*zip(*map(_objectives, front)), "o-", color="C3", label="Pareto front: none is better in both")
    for trial in weighed:
        axes.annotate(trial.name, _objectives(trial), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("target loss at the end")
    axes.set_ylabel("forgotten: mean rise of the retention sets' loss")
    axes.legend(fontsize=8)
    says = "On the front, from least target loss to least forgetting: " + ", ".join(trial.name for trial in front) + "."
    return _picture("pareto", "Learning against forgetting (left and low is better)", axes, says)


def _axes() -> Any:
    from matplotlib.figure import Figure  # no pyplot: no display is looked for, and no state is kept

    axes: Any = Figure(figsize=(7.5, 4.2), layout="constrained").subplots()
    axes.grid(alpha=0.3)
    return axes


def _colour(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * share)


def _picture(name: str, title: str, axes: Any, says: str) -> Picture:
    stream = BytesIO()
    with drawable_text(axes.figure):
        axes.figure.savefig(stream, format="png", dpi=110)
    return Picture(name, title, stream.getvalue(), says)
