"""Which examples meet in a micro batch, and how wide it is: the same to training and to the data report. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from qwen_cl.data.examples import Example

PADDING_MULTIPLE = 16
"""Rows are padded to a multiple of this: few distinct shapes, and tensor cores like it."""


def epoch_order(count: int, seed: int, epoch: int, number: int = 0) -> npt.NDArray[np.int64]:
    """A new permutation every epoch of the set of this number (the run's own is the first)."""
    return np.random.default_rng((seed, number, epoch)).permutation(count)


def longest_first(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Batches to measure a loss with, alike in length: least padding, and what does not fit in memory shows at once.

    Of the examples no more than a batch is kept, so they may be read as they are asked for.
    """
    order = sorted(range(len(examples)), key=[-len(example.ids) for example in examples].__getitem__)
    for start in range(0, len(order), size):
        yield [examples[number] for number in order[start : start + size]]


def padded_width(sizes: Sequence[int]) -> int:
    """Positions of a micro batch, in which every row is as wide as the longest."""
    return -(-max(sizes) // PADDING_MULTIPLE) * PADDING_MULTIPLE


def padding_share(sizes: Sequence[int], micro_batch_size: int, seed: int, width: int | None = None) -> float:
    """Part of the first epoch's positions that are padding; ``width`` is every row's, if it is the same."""
    order = epoch_order(len(sizes), seed, 0)
    computed = 0
    for first in range(0, len(sizes), micro_batch_size):
        together = [sizes[index] for index in order[first : first + micro_batch_size]]
        computed += (width or padded_width(together)) * len(together)
    return 1 - sum(sizes) / computed
