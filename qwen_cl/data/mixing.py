"""Order of the training examples: shuffled every epoch, and mixed in fixed ratios. No torch.

Everything is a function of the seed and the index alone, so a resumed run continues with the next example.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_cl.data.batching import epoch_order
from qwen_cl.data.examples import Example


class Shuffled:
    """An endless stream of one set, reshuffled every epoch."""

    def __init__(self, examples: Sequence[Example], seed: int, number: int) -> None:
        self.examples = examples
        self.seed, self.number = seed, number
        self._epoch, self._order = -1, np.arange(0)

    def __getitem__(self, index: int) -> Example:
        epoch, position = divmod(index, len(self.examples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(len(self.examples), self.seed, epoch, self.number)
        return self.examples[int(self._order[position])]


class Mixture(Sequence[Example]):
    """A mixture of sets, each with its share of the labels.

    Every example comes from the set furthest behind its share, so that over any part of the run no set deviates by more
    than about the length of the longest example.
    """

    def __init__(
        self, sets: Sequence[Sequence[Example]], shares: Sequence[float], *, num_samples: int, seed: int
    ) -> None:
        """Mix ``sets`` by their ``shares``, which sum to 1."""
        self.shares = np.asarray(shares, dtype=float)
        self.num_samples = num_samples
        self._streams = [Shuffled(examples, seed, number) for number, examples in enumerate(sets)]
        self._labels = np.zeros(len(sets))
        self._taken = [0] * len(sets)
        self._schedule: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        number, position = self.place(index)
        return self._streams[number][position]

    def place(self, index: int) -> tuple[int, int]:
        """Return the set of the example at this index, and the number of earlier examples from that set."""
        if len(self._streams) == 1:
            return 0, index
        while len(self._schedule) <= index:
            behind = self.shares * self._labels.sum() - self._labels
            number = int(np.argmax(np.where(self.shares > 0, behind, -np.inf)))
            position = self._taken[number]
            self._taken[number] += 1
            self._labels[number] += self._streams[number][position].num_labels
            self._schedule.append((number, position))
        return self._schedule[index]
