"""Measures of learning and forgetting over a chain of stages. Pure Python.

All are read off a matrix: row 0 is before any training, row k after stage k; a column is one evaluation set.

The signs, whatever is measured: average is the plain mean; backward and forward transfer are positive where training
helped; forgetting is positive where something was lost. Where lower values are better (losses, bits per byte) the
differences are turned around for that; their unit stays that of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BEFORE = 0
"""The row a set is learnt in that the base brings along."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """None where no set is of the kind that a measure is about."""

    average: float
    """Over all sets, after the last stage."""
    backward: float | None
    """What later stages did to a set after the one that taught it, mean over sets (Lopez-Paz & Ranzato 2017,
    arXiv 1706.08840, equation 3, which leaves out the sets of the last stage, as here)."""
    forward: float | None
    """What the stages before did to a set by the time its own began, mean over the sets that are not of the first
    stage (equation 4 there; the model before training is what it is compared with)."""
    forgetting: float | None
    """How far a set ended from its best before the last stage, mean over the sets learnt before that (Chaudhry et al.
    2018, arXiv 1801.10112, equation 3)."""


def measure_transfer(
    matrix: Sequence[Sequence[float]], learnt_in: Sequence[int], *, higher_is_better: bool
) -> Transfer:
    """``learnt_in`` has, per column, the row of the stage that teaches it; ``BEFORE`` for what the base knew.

    The papers know one set per stage and a model that knows nothing before the first. Here a set that the base knew
    counts as learnt before the first stage: backward transfer and forgetting are about it too, and forward transfer,
    which asks what helped to learn it, is not.

    Raises:
        ValueError: the rows are not of one length, there is no stage, or a set is learnt in no row.
    """
    last = len(matrix) - 1
    if last < 1 or any(len(row) != len(learnt_in) for row in matrix) or not learnt_in:
        raise ValueError("a matrix has the row before training, one per stage, and one column per set")
    if any(not BEFORE <= row <= last for row in learnt_in):
        raise ValueError(f"learnt_in ({list(learnt_in)}) must name rows 0 to {last}")
    sign = 1.0 if higher_is_better else -1.0
    gain = [[sign * value for value in row] for row in matrix]
    earlier = [(column, row) for column, row in enumerate(learnt_in) if row < last]
    ahead = [(column, row) for column, row in enumerate(learnt_in) if row > 1]
    return Transfer(
        average=sum(matrix[last]) / len(learnt_in),
        backward=_mean([gain[last][column] - gain[row][column] for column, row in earlier]),
        forward=_mean([gain[row - 1][column] - gain[BEFORE][column] for column, row in ahead]),
        forgetting=_mean([_best(gain, column, row) - gain[last][column] for column, row in earlier]),
    )


def _best(gain: list[list[float]], column: int, learnt: int) -> float:
    """Before the last stage. The row before training is no knowledge of a set that a stage had yet to teach."""
    return max(row[column] for row in gain[min(learnt, 1) : -1])


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
