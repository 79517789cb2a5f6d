"""Some documents of a corpus: what of it trains, or what validates. No torch."""

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
    """A piece of the only document of a corpus."""

    start: int
    stop: int
    """In its tokens, of which the last is its end-of-text."""
    text_bytes: int | None
    """As of ``Corpus``."""


@dataclass(frozen=True, slots=True)
class Selection:
    corpus: Corpus
    documents: npt.NDArray[np.int64]
    """Their indices, in rising order."""
    part: Part | None = None
    """Of the one document, where that is not whole."""

    def bounds(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where each starts in the ``.bin`` and where it ends, in ids: without a BOS of its own, with its end-of-text
        if its end is in it."""
        bounds = read_bounds(self.corpus.prefix)
        starts, stops = bounds[self.documents] + self.corpus.counts.has_bos, bounds[self.documents + 1]
        if self.part is None:
            return starts, stops
        return starts + self.part.start, np.minimum(starts + self.part.stop, stops)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, with its end-of-text and without BOS."""
        starts, stops = self.bounds()
        return stops - starts

    def texts(self) -> Iterator[npt.NDArray[Any]]:
        """The ids of each document's text, without what delimits it."""
        ids = read_ids(self.corpus.prefix)
        ends = read_bounds(self.corpus.prefix)[self.documents + 1]
        for start, stop, end in zip(*self.bounds(), ends):
            yield ids[start : min(stop, end - 1)]

    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the text, for bits per byte; None where they are not known."""
        return self.corpus.text_bytes(self.documents) if self.part is None else self.part.text_bytes
