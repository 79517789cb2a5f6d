"""Batch composition and padding, shared by training and the data report. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from qwen_cl.data.examples import Example

PADDING_MULTIPLE = 16
"""Sequences are padded to a multiple of this: few distinct shapes, and efficient tensor cores."""


def epoch_order(count: int, seed: int, epoch: int, number: int = 0) -> npt.NDArray[np.int64]:
    """Return the order of a set in one epoch: a permutation seeded by seed, set number (0: the target), and epoch."""
    return np.random.default_rng((seed, number, epoch)).permutation(count)


def longest_first(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Yield evaluation batches by decreasing length: least padding, and an out-of-memory error comes at once.

    Only one batch of examples is held at a time, so that they can be read lazily.
    """
    order = sorted(range(len(examples)), key=[-len(example.ids) for example in examples].__getitem__)
    for start in range(0, len(order), size):
        yield [examples[number] for number in order[start : start + size]]


def padded_width(sizes: Sequence[int]) -> int:
    """Return the width of a micro batch: the longest size, rounded up to :data:`PADDING_MULTIPLE`."""
    return -(-max(sizes) // PADDING_MULTIPLE) * PADDING_MULTIPLE


def padding_share(sizes: Sequence[int], micro_batch_size: int, seed: int, width: int | None = None) -> float:
    """Return the fraction of the first epoch's positions that is padding; ``width`` is the fixed width, if any."""
    order = epoch_order(len(sizes), seed, 0)
    computed = 0
    for first in range(0, len(sizes), micro_batch_size):
        together = [sizes[index] for index in order[first : first + micro_batch_size]]
        computed += (width or padded_width(together)) * len(together)
    return 1 - sum(sizes) / computed
