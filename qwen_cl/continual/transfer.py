"""The measures of transfer and forgetting over a sequence of stages.

All are computed from a matrix: row 0 is before any training, row k after stage k; a column is one evaluation set.

Signs: average is the plain mean; backward and forward transfer are positive if training helped; forgetting is positive
if a set got worse. Where lower values are better (losses, bits per byte) the differences are negated accordingly; their
unit is that of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BEFORE = 0
"""The row in which the sets that the base model already knows are learned."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """The measures of transfer; None where no set qualifies for a measure."""

    average: float
    """Mean over all sets after the last stage."""
    backward: float | None
    """Effect of the stages after the one that teaches a set, mean over sets (Lopez-Paz & Ranzato 2017,
    arXiv 1706.08840, equation 3, which excludes the sets of the last stage, as here)."""
    forward: float | None
    """Effect of the stages before the one that teaches a set, mean over the sets that are not of the first stage
    (equation 4 there, with the model before training as the reference)."""
    forgetting: float | None
    """Difference between a set's best value before the last stage and its final value, mean over the sets learned
    before the last stage (Chaudhry et al. 2018, arXiv 1801.10112, equation 3)."""


def measure_transfer(
    matrix: Sequence[Sequence[float]], learned_in: Sequence[int], *, higher_is_better: bool
) -> Transfer:
    """Compute the measures. ``learned_in`` has, per column, the row of the stage that teaches the set, or ``BEFORE``.

    The papers assume one set per stage and a model that knows nothing before the first. Here a set that the base model
    knows counts as learned before the first stage: backward transfer and forgetting include it, and forward transfer
    does not.

    Raises:
        ValueError: the rows differ in length, there is no stage, or a set is learned in no row of the matrix.
    """
    last = len(matrix) - 1
    if last < 1 or any(len(row) != len(learned_in) for row in matrix) or not learned_in:
        raise ValueError("a matrix has the row before training, one per stage, and one column per set")
    if any(not BEFORE <= row <= last for row in learned_in):
        raise ValueError(f"learned_in ({list(learned_in)}) must name rows 0 to {last}")
    sign = 1.0 if higher_is_better else -1.0
    gain = [[sign * value for value in row] for row in matrix]
    earlier = [(column, row) for column, row in enumerate(learned_in) if row < last]
    ahead = [(column, row) for column, row in enumerate(learned_in) if row > 1]
    return Transfer(
        average=sum(matrix[last]) / len(learned_in),
        backward=_mean([gain[last][column] - gain[row][column] for column, row in earlier]),
        forward=_mean([gain[row - 1][column] - gain[BEFORE][column] for column, row in ahead]),
        forgetting=_mean([_best(gain, column, row) - gain[last][column] for column, row in earlier]),
    )


def _best(gain: list[list[float]], column: int, learned: int) -> float:
    """Return the best value before the last stage, without the row before training for a set that a stage teaches."""
    return max(row[column] for row in gain[min(learned, 1) : -1])


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
