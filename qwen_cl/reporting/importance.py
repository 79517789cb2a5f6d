"""How much each key of a sweep had to do with a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_cl.reporting.run_summary import RunSummary, differing, number

FEWEST = 3
"""Trials, below which any two numbers correlate."""


@dataclass(frozen=True, slots=True)
class Importance:
    key: str
    strength: float
    """0: nothing to do with it, 1: decides it."""
    direction: str
    """What to do for a lower result, where that can be said."""


def importances(trials: Sequence[RunSummary], values: Sequence[float]) -> list[Importance]:
    """Of each differing key for ``values``, one a trial; the strongest first. Empty below three trials.

    Numbers by Spearman's rank correlation; names by the correlation ratio (the share of the ranks' variance that
    lies between the names, as a root), which takes no order for granted.
    """
    if len(trials) < FEWEST:
        return []
    found = [
        _importance(key, [trial.overrides.get(key) for trial in trials], values) for key in differing(list(trials))
    ]
    return sorted(found, key=lambda importance: -importance.strength)


def _importance(key: str, settings: Sequence[str | None], values: Sequence[float]) -> Importance:
    import pandas

    ranks = pandas.Series(values, dtype=float).rank()
    if ranks.nunique() < 2:
        return Importance(key, 0.0, "all alike")
    numbers = [number(setting) for setting in settings]
    if None not in numbers:
        correlation = float(pandas.Series(numbers, dtype=float).rank().corr(ranks))
        return Importance(key, abs(correlation), "raise it" if correlation < 0 else "lower it")
    names = pandas.Series([setting or "unset" for setting in settings])
    means = ranks.groupby(names).transform("mean")
    ratio = float((means.var(ddof=0) / ranks.var(ddof=0)) ** 0.5)
    return Importance(key, ratio, f"{names[int(means.argmin())]} is best")
