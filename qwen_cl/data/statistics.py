"""Data report of rows: lengths, loss tokens, truncation, duplicates and padding. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qwen_cl.config.task.training import LossOn
from qwen_cl.data.batching import padded_width, padding_share
from qwen_cl.data.chat.conversations import Conversation
from qwen_cl.data.chat.encode import unused_fields
from qwen_cl.data.examples import Example, untruncated_examples
from qwen_cl.data.leakage import NearPairs
from qwen_cl.data.normalize import normalize, row_text, text_key
from qwen_cl.data.overlap import Overlap
from qwen_cl.data.packing import plan_packs
from qwen_cl.data.raw_text import document_delimiters
from qwen_cl.data.rows import Row, Text
from qwen_cl.data.unicode_scripts import writing_shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERED, RENDERED_TOKENS = 10, 400
QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLayout:
    """The settings by which rows become micro batches."""

    sequence_length: int
    micro_batch_size: int
    seed: int
    loss_on: LossOn
    packing: bool
    static_shapes: bool = False
    """Packed sequences are all padded to ``sequence_length``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """The statistics of the training rows: conversations or documents. Lengths are in tokens, before truncation."""

    documents: bool
    rows: int
    tokens: int
    labels: int
    """Loss tokens within ``sequence_length``."""
    lengths: dict[str, int]
    """Quantiles of the lengths, by name."""
    histogram: list[tuple[int, int, int]]
    """Bins: first length, last length (included), number of rows."""
    truncated: int
    """Rows longer than ``sequence_length``; 0 for documents, which are cut into sequences."""
    truncated_labels: int
    """Loss tokens lost by truncation."""
    without_labels: int
    """Rows without loss tokens, which are left out."""
    duplicates: int
    """Rows with the same normalized text (NFKC, whitespace collapsed) as an earlier one; documents of a corpus with the
    same tokens."""
    packing: bool
    sequences: dict[str, int]
    """Sequences per epoch: ``unpacked``, one row each (not for documents), and ``packed``."""
    padding: dict[str, float]
    """Fraction of padding, ``unpacked`` and ``packed``."""
    writing: dict[str, float]
    """Fraction of the characters, without whitespace, by writing system."""
    sampled: int | None
    """Number of rows sampled for ``writing``; None for all."""
    rendered: list[str]
    """Some rows as they are trained on; tokens in [[ ]] are not in the loss."""
    overlap: Overlap | None
    """Overlap of the validation rows with the training data; None if not computed."""
    retention_overlap: dict[str, Overlap]
    """Overlap of each retention set, by name."""
    near_duplicates: list[NearPairs] = field(default_factory=list)
    """Near duplicates in the validation set and in each retention set."""
    unused_fields: dict[str, dict[str, int]] = field(default_factory=dict)
    """By name of the set, the fields of its rows that are not rendered, with the number of rows that have them."""


def describe(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    layout: SequenceLayout,
    overlap: Overlap | None = None,
    retention_overlap: Mapping[str, Overlap] | None = None,
    unused: Mapping[str, dict[str, int]] | None = None,
) -> DataReport:
    """Return the data report of rows. Tokenizes every row once, and retains only those that are shown."""
    documents = isinstance(rows[0], Text)
    shown = set(np.linspace(0, len(rows) - 1, min(RENDERED, len(rows))).round().astype(int).tolist())
    lengths, sizes, rendered = [], [], []
    labels = truncated = truncated_labels = 0
    keys: set[bytes] = set()
    characters: Counter[str] = Counter()
    for number, (row, full) in enumerate(zip(rows, untruncated_examples(rows, tokenizer, layout.loss_on))):
        cut = full if documents else full.cut(layout.sequence_length + 1)
        lengths.append(len(full.ids))
        labels += cut.num_labels
        truncated += len(cut.ids) < len(full.ids)
        truncated_labels += full.num_labels - cut.num_labels
        if cut.num_labels:
            sizes.append(cut.num_positions)
        text = row_text(row)
        keys.add(text_key(normalize(text)))
        characters.update(text)
        if number in shown:
            rendered.append(render(cut, tokenizer))
    if documents:
        bos_id = document_delimiters(tokenizer).bos_id
        sizes = stream_sizes(sum(lengths), layout.sequence_length, bos=bos_id is not None)
        labels = sum(lengths) - (len(rows) if bos_id is not None else 0)
    by_way, padding = sequences(sizes, layout, documents=documents)
    return DataReport(
        documents=documents,
        rows=len(rows),
        tokens=sum(lengths),
        labels=labels,
        lengths=quantiles(lengths),
        histogram=histogram(lengths),
        truncated=truncated,
        truncated_labels=truncated_labels,
        without_labels=0 if documents else len(rows) - len(sizes),
        duplicates=len(rows) - len(keys),
        packing=layout.packing or documents,
        sequences=by_way,
        padding=padding,
        writing=writing_shares(characters),
        sampled=None,
        rendered=rendered,
        overlap=overlap,
        retention_overlap=dict(retention_overlap or {}),
        unused_fields={name: counts for name, counts in (unused or {}).items() if counts},
    )


def count_unused_fields(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Count the rows with each field that is not rendered, by field name."""
    return dict(
        Counter(name for row in rows if isinstance(row, Conversation) for name in unused_fields(row, tokenizer))
    )


def quantiles(lengths: Sequence[int] | npt.NDArray[np.int64]) -> dict[str, int]:
    return {name: int(np.quantile(lengths, part, method="inverted_cdf")) for name, part in QUANTILES.items()}


def stream_sizes(tokens: int, sequence_length: int, *, bos: bool) -> list[int]:
    """Return the positions of the sequences that joined documents are cut into (examples.py). ``tokens`` includes the
    end-of-text and, if ``bos``, the BOS of each document; without BOS, an end-of-text precedes the first."""
    full, rest = divmod(tokens - bos, sequence_length)
    return [sequence_length] * full + [rest] * (rest > 0)


def sequences(sizes: list[int], layout: SequenceLayout, *, documents: bool) -> tuple[dict[str, int], dict[str, float]]:
    """Return ``DataReport.sequences`` and ``padding``; ``sizes`` are positions of rows or of joined documents."""
    by_way = {"packed": sizes}
    if not documents:
        packs = plan_packs(sizes, layout.sequence_length)
        by_way = {"unpacked": sizes, "packed": [sum(sizes[index] for index in pack) for pack in packs]}
    width = padded_width([layout.sequence_length]) if layout.static_shapes else None
    padding = {
        way: padding_share(found, layout.micro_batch_size, layout.seed, width if way == "packed" else None)
        for way, found in by_way.items()
    }
    return {way: len(found) for way, found in by_way.items()}, padding


def histogram(lengths: Iterable[int]) -> list[tuple[int, int, int]]:
    """Return a histogram with bins of doubling width, from the shortest to the longest length."""
    counts = Counter(max(1, (length - 1).bit_length()) for length in lengths)
    bins = range(min(counts), max(counts) + 1)
    return [(2 ** (power - 1) + 1 if power > 1 else 1, 2**power, counts[power]) for power in bins]


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    shown = example.cut(RENDERED_TOKENS)
    parts, done = [], 0
    for start, stop in [*shown.loss_spans, (len(shown.ids), len(shown.ids))]:
        if start > done:
            parts.append(f"[[{tokenizer.decode(shown.ids[done:start])}]]")
        parts.append(tokenizer.decode(shown.ids[start:stop]))
        done = stop
    more = len(example.ids) - len(shown.ids)
    return "".join(parts) + (f" … and {more:,} more tokens" if more else "")
