"""The importance of each key of a sweep for a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_cl.reporting.run_summary import RunSummary, differing, number

MIN_TRIALS = 3
"""The number of trials below which any two values correlate."""


@dataclass(frozen=True, slots=True)
class Importance:
    """The importance of one key."""

    key: str
    strength: float
    """From 0 (no correlation) to 1 (full correlation)."""
    direction: str
    """The change that lowers the result, if the correlation shows one."""


def importances(trials: Sequence[RunSummary], values: Sequence[float]) -> list[Importance]:
    """Return the importance of each differing key for ``values`` (one per trial), sorted; empty below three trials.

    Numeric keys are measured by Spearman's rank correlation; categorical keys by the correlation ratio (square root of
    the fraction of the ranks' variance between the categories), which assumes no order.
    """
    if len(trials) < MIN_TRIALS:
        return []
    found = [
        _importance(key, [trial.overrides.get(key) for trial in trials], values) for key in differing(list(trials))
    ]
    return sorted(found, key=lambda importance: -importance.strength)


def _importance(key: str, settings: Sequence[str | None], values: Sequence[float]) -> Importance:
    import pandas

    ranks = pandas.Series(values, dtype=float).rank()
    if ranks.nunique() < 2:
        return Importance(key, 0.0, "no difference")
    numbers = [number(setting) for setting in settings]
    if None not in numbers:
        correlation = float(pandas.Series(numbers, dtype=float).rank().corr(ranks))
        return Importance(key, abs(correlation), "raise it" if correlation < 0 else "lower it")
    names = pandas.Series([setting or "unset" for setting in settings])
    means = ranks.groupby(names).transform("mean")
    ratio = float((means.var(ddof=0) / ranks.var(ddof=0)) ** 0.5)
    return Importance(key, ratio, f"{names[int(means.argmin())]} is best")
