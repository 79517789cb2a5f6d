"""Selections of documents of a corpus, for training or validation. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_cl.data.corpus.cache import Corpus
from qwen_cl.data.corpus.indexed_reader import read_bounds, read_ids


@dataclass(frozen=True, slots=True)
class Part:
    """A range of the only document of a corpus."""

    start: int
    stop: int
    """Half-open range of token indices; the last token is the end-of-text."""
    text_bytes: int | None
    """See ``Corpus``."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Documents of a corpus, or a range of its only document."""

    corpus: Corpus
    documents: npt.NDArray[np.int64]
    """Indices, ascending."""
    part: Part | None = None
    """Range of the only document; None for complete documents."""

    def bounds(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the start and end of each document in the ``.bin``, in ids: without a stored BOS, with the end-of-text
        if the range includes it."""
        bounds = read_bounds(self.corpus.prefix)
        starts, stops = bounds[self.documents] + self.corpus.counts.has_bos, bounds[self.documents + 1]
        if self.part is None:
            return starts, stops
        return starts + self.part.start, np.minimum(starts + self.part.stop, stops)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each document, with end-of-text and without BOS."""
        starts, stops = self.bounds()
        return stops - starts

    def texts(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the ids of each document, without delimiters."""
        ids = read_ids(self.corpus.prefix)
        ends = read_bounds(self.corpus.prefix)[self.documents + 1]
        for start, stop, end in zip(*self.bounds(), ends):
            yield ids[start : min(stop, end - 1)]

    def text_bytes(self) -> int | None:
        """Return the UTF-8 bytes of the text, for bits per byte; None if not known."""
        return self.corpus.text_bytes(self.documents) if self.part is None else self.part.text_bytes
