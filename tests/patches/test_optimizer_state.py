"""The distributed optimizer's state as it is saved: what Megatron would have gathered, each part from one rank."""

from __future__ import annotations

import pytest

from qwen_cl.patches.optimizer_state import StatePiece, pieces_of
from tests.support import optimizer_state_probe
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_save_what_megatron_would_gather(ranks: int) -> None:
    done = run_ranks(optimizer_state_probe.main, ranks=ranks)
    assert done.returncode == 0, done.log[-3000:]


def test_the_parts_of_a_parameter() -> None:
    assert pieces_of(10, 20, 0, 100) == [StatePiece(0, 0, 10)]
    assert pieces_of(90, 100, 0, 100) == [StatePiece(0, 0, 10)]  # to the last element of a share
    assert pieces_of(100, 110, 0, 100) == [StatePiece(1, 0, 10)]
    assert pieces_of(1090, 1310, 1000, 100) == [
        StatePiece(0, 0, 10),
        StatePiece(1, 10, 110),
        StatePiece(2, 110, 210),
        StatePiece(3, 210, 220),
    ]
