"""What a corpus is, before anything is trained on it: the data report, of tokens rather than of rows. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qwen_cl.data.corpus.target import Selection, TextTarget, document_ids
from qwen_cl.data.examples import Example
from qwen_cl.data.overlap import Overlap
from qwen_cl.data.report import RENDERED, DataReport, Layout, histogram, quantiles, render, sequences, stream_sizes
from qwen_cl.data.writing import writing_shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 2**21
"""Tokens that characters are counted in, roughly: decoding them takes some seconds."""
LONGER = 4
"""A document of the sample is cut at so many times its share of it."""


def describe_corpus(
    target: TextTarget,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    overlap: Overlap,
    retention_overlap: Mapping[str, Overlap],
) -> DataReport:
    """Everything is counted over all documents that train, except characters: of a large corpus over a sample."""
    trained, _ = target.split()
    lengths = target.lengths(trained)
    sampled, characters = _characters(trained, lengths, tokenizer)
    sizes = stream_sizes(int(lengths.sum()), layout.sequence_length)
    by_way, padding = sequences(sizes, layout, documents=True)
    return DataReport(
        documents=True,
        rows=len(lengths),
        tokens=int(lengths.sum()),
        labels=sum(sizes),
        lengths=quantiles(lengths),
        histogram=histogram(lengths.tolist()),
        truncated=0,
        truncated_labels=0,
        without_labels=0,
        duplicates=_duplicates(trained),
        packing=True,
        sequences=by_way,
        padding=padding,
        writing=writing_shares(characters),
        sampled=sampled,
        rendered=_rendered(trained, tokenizer),
        overlap=overlap,
        retention_overlap=dict(retention_overlap),
    )


def _duplicates(selection: Selection) -> int:
    keys = {hashlib.sha256(ids.tobytes()).digest()[:16] for ids in document_ids(*selection)}
    return len(selection[1]) - len(keys)


def _characters(
    selection: Selection, lengths: npt.NDArray[np.int64], tokenizer: PreTrainedTokenizerBase
) -> tuple[int | None, Counter[str]]:
    """Of all documents, or of so many, spread evenly."""
    corpus, documents = selection
    counts: Counter[str] = Counter()
    tokens = int(lengths.sum())
    if tokens <= SAMPLE:
        for ids in document_ids(corpus, documents):
            counts.update(tokenizer.decode(ids))
        return None, counts
    number = max(RENDERED, len(documents) * SAMPLE // tokens)
    chosen = _spread(documents, number)
    for ids in document_ids(corpus, chosen):
        counts.update(tokenizer.decode(ids[: LONGER * SAMPLE // number]))
    return len(chosen), counts


def _rendered(selection: Selection, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    corpus, documents = selection
    shown = document_ids(corpus, _spread(documents, RENDERED))
    return [render(Example(ids.tolist(), ((0, len(ids)),)), tokenizer) for ids in shown]


def _spread(documents: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
    """The first, the last, and those between at even distances."""
    places = np.linspace(0, len(documents) - 1, min(number, len(documents))).round().astype(np.int64)
    return documents[places]
