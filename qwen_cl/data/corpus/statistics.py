"""Data report of a corpus, computed from its tokens. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from qwen_cl.data.corpus.selection import Selection
from qwen_cl.data.corpus.text_dataset import TextTarget
from qwen_cl.data.examples import Example
from qwen_cl.data.overlap import Overlap
from qwen_cl.data.statistics import (
    RENDERED,
    DataReport,
    SequenceLayout,
    histogram,
    quantiles,
    render,
    sequences,
    stream_sizes,
)
from qwen_cl.data.unicode_scripts import writing_shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 2**21
"""Approximate number of tokens decoded to count characters, which takes some seconds."""
LONGER = 4
"""Sampled documents are truncated to this multiple of their equal share of the sample."""


def describe_corpus(
    target: TextTarget,
    tokenizer: PreTrainedTokenizerBase,
    layout: SequenceLayout,
    overlap: Overlap,
    retention_overlap: Mapping[str, Overlap],
) -> DataReport:
    """Return the data report of the training documents. Characters of a large corpus are counted in a sample."""
    trained, _ = target.split()
    lengths = target.lengths(trained)
    tokens = int(lengths.sum())
    sampled, characters = _characters(trained, tokens, tokenizer)
    sizes = stream_sizes(tokens, layout.sequence_length, bos=target.bos_id is not None)
    by_way, padding = sequences(sizes, layout, documents=True)
    return DataReport(
        documents=True,
        rows=len(lengths),
        tokens=tokens,
        labels=int(trained.lengths().sum()),
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
        rendered=_rendered(trained, target.bos_id, tokenizer),
        overlap=overlap,
        retention_overlap=dict(retention_overlap),
    )


def _duplicates(selection: Selection) -> int:
    keys = {hashlib.sha256(ids.tobytes()).digest()[:16] for ids in selection.texts()}
    return len(selection.documents) - len(keys)


def _characters(
    selection: Selection, tokens: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[int | None, Counter[str]]:
    """Count the characters of all documents, or of an evenly spaced sample; return its size, or None."""
    counts: Counter[str] = Counter()
    if tokens <= SAMPLE:
        for ids in selection.texts():
            counts.update(tokenizer.decode(ids))
        return None, counts
    number = max(RENDERED, len(selection.documents) * SAMPLE // tokens)
    chosen = _spread(selection, number)
    for ids in chosen.texts():
        counts.update(tokenizer.decode(ids[: LONGER * SAMPLE // number]))
    return len(chosen.documents), counts


def _rendered(selection: Selection, bos_id: int | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    before = [] if bos_id is None else [bos_id]
    shown = ([*before, *ids.tolist()] for ids in _spread(selection, RENDERED).texts())
    return [render(Example(ids, ((len(before), len(ids)),)), tokenizer) for ids in shown]


def _spread(selection: Selection, number: int) -> Selection:
    """Return an evenly spaced sample of the documents, with the first and the last."""
    documents = selection.documents
    places = np.linspace(0, len(documents) - 1, min(number, len(documents))).round().astype(np.int64)
    return replace(selection, documents=documents[places])
