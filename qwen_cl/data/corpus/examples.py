"""Sequences read lazily from an indexed dataset. Needs megatron-core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from qwen_cl.data.corpus.selection import Selection
from qwen_cl.data.examples import Example
from qwen_cl.data.raw_text import Delimiters, spans_without


class CorpusExamples(Sequence[Example]):
    """The sequences of joined documents, of ``sequence_length`` positions each.

    Each document begins with BOS, which is not a label; without a BOS, the stream starts with an end-of-text token.
    Every document ends with end-of-text, so each id of each document is a label exactly once. Consecutive examples
    share an id; the last may be shorter. Memory use is 16 bytes per document.
    """

    def __init__(self, selection: Selection, sequence_length: int, delimiters: Delimiters) -> None:
        """Open the dataset of ``selection``, which has at least one document."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.sequence_length, self.delimiters = sequence_length, delimiters
        self._dataset = IndexedDataset(selection.corpus.prefix)
        self._dtype = np.dtype(self._dataset.index.dtype)
        self._starts, stops = selection.bounds()
        """Start of each document in the .bin, in ids."""
        self._label_count = int((stops - self._starts).sum())
        lengths = stops - self._starts + (delimiters.bos_id is not None)
        lengths[0] += delimiters.bos_id is None
        self._offsets = np.concatenate(([0], np.cumsum(lengths)))
        """Start of each document in the stream, with the token before it; and the end of the stream."""

    def __len__(self) -> int:
        return int(-(-(self._offsets[-1] - 1) // self.sequence_length))

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError
        start = number * self.sequence_length
        return self._read(start, min(start + self.sequence_length + 1, int(self._offsets[-1])))

    @property
    def num_labels(self) -> int:
        return self._label_count

    def _read(self, start: int, stop: int) -> Example:
        """Read a range of the stream."""
        ids: list[int] = []
        bos_places: list[int] = []
        number, place = int(np.searchsorted(self._offsets, start, side="right")) - 1, start
        while place < stop:
            within = place - int(self._offsets[number])
            before = 1 if number == 0 or self.delimiters.bos_id is not None else 0
            if within < before:
                bos_places.append(len(ids))
                ids.append(self.delimiters.first_id)
                place, within = place + 1, 1
            until = min(stop, int(self._offsets[number + 1]))
            first = int(self._starts[number]) + within - before
            piece: Any = self._dataset.bin_reader.read(
                dtype=self._dtype.type, count=until - place, offset=first * self._dtype.itemsize
            )
            ids += piece.tolist()
            place, number = until, number + 1
        return Example(ids, spans_without(len(ids), bos_places))
