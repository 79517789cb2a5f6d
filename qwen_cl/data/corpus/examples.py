"""Sequences cut from an indexed dataset as they are asked for. Needs megatron-core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from qwen_cl.data.examples import Example


class CorpusExamples(Sequence[Example]):
    """The documents one after another, cut to ``sequence_length`` labels each.

    The stream starts with an end-of-text, and every document ends with one: so each id of each document is a label
    exactly once, the first of them too. Consecutive examples share an id; the last may be shorter. In memory are
    16 bytes a document, whatever its length.
    """

    def __init__(self, prefix: str, documents: npt.NDArray[np.int64], sequence_length: int, eos_id: int) -> None:
        """``documents``: indices into the dataset, in the order they are joined in; at least one."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.sequence_length, self.eos_id = sequence_length, eos_id
        self._dataset = IndexedDataset(prefix)
        self._dtype = np.dtype(self._dataset.index.dtype)
        tokens_before = np.concatenate(([0], np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)))
        bounds = tokens_before[self._dataset.document_indices]
        self._starts = bounds[documents]
        """Of each document in the .bin, in ids."""
        self._offsets = np.concatenate(([0], np.cumsum(bounds[documents + 1] - self._starts)))
        """Of each document in the stream, without the stream's first id; and its end."""

    def __len__(self) -> int:
        return int(-(-self._offsets[-1] // self.sequence_length))

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError
        start = number * self.sequence_length
        labels = self._read(start, min(start + self.sequence_length, int(self._offsets[-1])))
        before = self._read(start - 1, start) if start else [self.eos_id]
        return Example([*before, *labels], ((1, len(labels) + 1),))

    @property
    def num_labels(self) -> int:
        return int(self._offsets[-1])

    def _read(self, start: int, stop: int) -> list[int]:
        """Ids of the stream, counted from the first document's first."""
        ids: list[int] = []
        number = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while start < stop:
            until = min(stop, int(self._offsets[number + 1]))
            place = int(self._starts[number]) + start - int(self._offsets[number])
            piece: Any = self._dataset.bin_reader.read(
                dtype=self._dtype.type, count=until - start, offset=place * self._dtype.itemsize
            )
            ids += piece.tolist()
            start, number = until, number + 1
        return ids
