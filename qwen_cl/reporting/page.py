"""The report as one self-contained HTML file: it loads nothing, and its tables are readable without JavaScript."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.reporting.figures import draw_plots
from qwen_cl.reporting.run_summary import RunSummary, differing, number
from qwen_cl.runs.status import now

FACTS = (
    "model_source",
    "model_commit",
    "model_adapter",
    "data_sha256",
    "git_commit",
    "device",
    "trainable_parameters",
    "versions",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table."""

    text: str
    value: float | None = None
    """The value to sort by; None to sort by the text."""
    kind: str = "word"
    """The CSS class."""

    @classmethod
    def of(cls, value: float | None, form: str) -> Cell:
        """Return the cell of a number; empty for None."""
        return cls("", None, "number") if value is None else cls(format(value, form), value, "number")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page."""

    columns: list[str]
    rows: list[list[Cell]]


def render_page(trials: Sequence[RunSummary], title: str) -> str:
    """Return the HTML of the page. ``trials`` are sorted, the best first."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["b64"] = lambda content: base64.b64encode(content).decode()
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=f"Written {now().isoformat()} from the files of {len(trials)} run{'s' if len(trials) > 1 else ''}.",
        verdict=_verdict(trials),
        trials=_trial_table(trials),
        explanation=(
            "Losses are in nats per token, averaged over the loss tokens. Forgetting is the mean increase of the "
            "retention sets' losses since step 0: above 0 is worse. Tokens/s is the median over the steps. "
            "Device-seconds are seconds times devices."
        ),
        plots=draw_plots(trials),
        samples=_samples(trials[0]),
        sampled=trials[0].name,
        facts=_facts(trials),
    )


def _verdict(trials: Sequence[RunSummary]) -> str | None:
    if len(trials) < 2:
        return None
    done = [trial for trial in trials if trial.completed]
    cost = f"{sum(trial.status.seconds or 0 for trial in trials):,.0f} s in total"
    tally = f"{len(done)} of {len(trials)} completed, {cost}."
    if not done:
        return f"No trial completed with a validation loss; {tally}"
    best = done[0]
    assert best.loss is not None
    text = f"Best: {best.name}, target loss {best.loss:.4f}"
    if len(done) > 1 and done[1].loss is not None:
        text += f", {done[1].loss - best.loss:.4f} below the second best, {done[1].name}"
    return f"{text}. {tally}"


def _trial_table(trials: Sequence[RunSummary]) -> Table:
    keys = differing(list(trials))
    sets = list(dict.fromkeys(curve.name for trial in trials for curve in trial.retention))
    columns = [
        "run",
        "state",
        *keys,
        "step",
        "target loss",
        "at step 0",
        "forgetting",
        *(f"{name} loss" for name in sets),
    ]
    columns += ["tokens/s", "peak GiB", "seconds", "device-seconds", "reason"]
    return Table(columns, [_trial_row(trial, keys, sets) for trial in trials])


def _trial_row(trial: RunSummary, keys: Iterable[str], sets: Iterable[str]) -> list[Cell]:
    settings = [trial.overrides.get(key) for key in keys]
    seconds = trial.status.seconds
    return [
        Cell(trial.name),
        Cell(trial.status.state or "UNKNOWN"),
        *(Cell(text or "", number(text), "word" if number(text) is None else "number") for text in settings),
        Cell.of(trial.status.step, "d"),
        Cell.of(trial.loss, ".4f"),
        Cell.of(trial.first_loss, ".4f"),
        Cell.of(trial.forgetting, "+.4f"),
        *(Cell.of(trial.retention_losses.get(name), ".4f") for name in sets),
        Cell.of(trial.tokens_per_second, ",.0f"),
        Cell.of(trial.status.peak_memory_gib, ".2f"),
        Cell.of(seconds, ",.0f"),
        Cell.of(None if seconds is None else seconds * trial.devices, ",.0f"),
        Cell(trial.status.reason or ""),
    ]


def _samples(trial: RunSummary) -> Table:
    steps = sorted({sample.step for sample in trial.samples})
    expected = {sample.prompt: sample.expected for sample in trial.samples}
    answers = {(sample.prompt, sample.step): sample.answer for sample in trial.samples}
    rows = [[prompt, expected[prompt], *(answers.get((prompt, step), "") for step in steps)] for prompt in expected]
    columns = ["prompt", "expected", *(f"step {step}" for step in steps)]
    return Table(columns, [[Cell(text, kind="text") for text in row] for row in rows])


def _facts(trials: Sequence[RunSummary]) -> Table:
    """Return the facts of all runs: each value once, with the runs that have it."""
    rows = []
    for name in FACTS:
        values: dict[str, list[str]] = {}
        for trial in trials:
            if (value := getattr(trial.status, name)) not in (None, {}):
                values.setdefault(_plain(value), []).append(trial.name)
        for text, names in values.items():
            runs = "all" if len(names) == len(trials) else ", ".join(names)
            rows.append([Cell(name.replace("_", " ")), Cell(text), Cell(runs)])
    return Table(["fact", "value", "runs"], rows)


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {text}" for name, text in value.items()) if isinstance(value, dict) else str(value)
