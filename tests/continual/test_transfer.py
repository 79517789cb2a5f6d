"""The measures of transfer and forgetting against the papers' formulas, computed by hand."""

from __future__ import annotations

import pytest

from qwen_cl.continual.transfer import BEFORE, Transfer, measure_transfer

ACCURACY = [
    [0.10, 0.20, 0.30],  # before training
    [0.90, 0.25, 0.20],
    [0.70, 0.80, 0.50],
    [0.60, 0.85, 0.95],
]


def test_one_set_per_stage_as_in_the_papers() -> None:
    found = measure_transfer(ACCURACY, [1, 2, 3], higher_is_better=True)
    assert found.average == pytest.approx((0.60 + 0.85 + 0.95) / 3)
    assert found.backward == pytest.approx(((0.60 - 0.90) + (0.85 - 0.80)) / 2)
    assert found.forward == pytest.approx(((0.25 - 0.20) + (0.50 - 0.30)) / 2)
    # The first set was best after stage 1 (0.90); the second after stage 2 (0.80), and ended better: -0.05.
    assert found.forgetting == pytest.approx(((0.90 - 0.60) + (0.80 - 0.85)) / 2)


def test_losses_have_the_same_signs() -> None:
    losses = [[-value for value in row] for row in ACCURACY]
    accuracy = measure_transfer(ACCURACY, [1, 2, 3], higher_is_better=True)
    found = measure_transfer(losses, [1, 2, 3], higher_is_better=False)
    assert found == Transfer(-accuracy.average, accuracy.backward, accuracy.forward, accuracy.forgetting)


def test_what_the_base_knew_can_be_forgotten() -> None:
    """Measure losses of English (known to the base), Japanese (first stage) and instructions (second stage)."""
    matrix = [[2.0, 5.0, 6.0], [2.6, 3.0, 5.5], [2.4, 3.2, 1.0]]
    found = measure_transfer(matrix, [BEFORE, 1, 2], higher_is_better=False)
    assert found.average == pytest.approx((2.4 + 3.2 + 1.0) / 3)
    assert found.backward == pytest.approx(-((2.4 - 2.0) + (3.2 - 3.0)) / 2)
    assert found.forward == pytest.approx(6.0 - 5.5)
    assert found.forgetting == pytest.approx(((2.4 - 2.0) + (3.2 - 3.0)) / 2)


def test_forgetting_looks_at_the_best_there_was_not_at_the_stage_that_taught() -> None:
    matrix = [[0.9, 0.0], [0.5, 0.3], [0.2, 0.6], [0.4, 0.4]]
    found = measure_transfer(matrix, [1, 1], higher_is_better=True)
    assert found.forgetting == pytest.approx(((0.5 - 0.4) + (0.6 - 0.4)) / 2)  # 0.9 was before training
    assert found.backward == pytest.approx(((0.4 - 0.5) + (0.4 - 0.3)) / 2)
    known = measure_transfer(matrix, [BEFORE, 1], higher_is_better=True)
    assert known.forgetting == pytest.approx(((0.9 - 0.4) + (0.6 - 0.4)) / 2)


def test_one_stage_alone_has_no_transfer_between_stages() -> None:
    found = measure_transfer([[3.0, 2.0], [1.0, 2.5]], [1, 1], higher_is_better=False)
    assert found == Transfer(average=1.75, backward=None, forward=None, forgetting=None)


@pytest.mark.parametrize(
    ("matrix", "learned_in", "message"),
    [
        ([[1.0]], [0], "one per stage"),
        ([[1.0], [1.0, 2.0]], [1], "one column per set"),
        ([[], []], [], "one column per set"),
        ([[1.0], [1.0]], [2], r"learned_in \(\[2\]\) must name rows 0 to 1"),
    ],
)
def test_what_is_no_matrix(matrix: list[list[float]], learned_in: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_transfer(matrix, learned_in, higher_is_better=False)
