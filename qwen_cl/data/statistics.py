"""What a training set is, before anything is trained on it. No torch."""

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
    """How a run makes micro batches of the rows."""

    sequence_length: int
    micro_batch_size: int
    seed: int
    loss_on: LossOn
    packing: bool
    static_shapes: bool = False
    """Packed rows are all padded to ``sequence_length``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """Of the training rows, each a conversation or a document. Lengths are in tokens, before anything is cut."""

    documents: bool
    rows: int
    tokens: int
    labels: int
    """Tokens that count, of those within ``sequence_length``."""
    lengths: dict[str, int]
    """By name of the quantile."""
    histogram: list[tuple[int, int, int]]
    """From, to (included), rows."""
    truncated: int
    """Rows longer than ``sequence_length``; documents are cut into sequences and lose nothing."""
    truncated_labels: int
    """Labels past the cut."""
    without_labels: int
    """Rows of which nothing counts, so that they are left out."""
    duplicates: int
    """Rows whose text is that of an earlier one, after NFKC and with any whitespace for a space; of a corpus, documents
    whose tokens are."""
    packing: bool
    sequences: dict[str, int]
    """In an epoch: ``unpacked``, one row each (not for documents), and ``packed``."""
    padding: dict[str, float]
    """Part of the positions that are computed for nothing, likewise."""
    writing: dict[str, float]
    """Part of the characters, whitespace apart, by writing system."""
    sampled: int | None
    """Rows that ``writing`` was counted in; None for all."""
    rendered: list[str]
    """Some rows as they are trained on; what is in [[ ]] does not count."""
    overlap: Overlap | None
    """Of the validation rows with what is trained on; None where it was not looked for."""
    retention_overlap: dict[str, Overlap]
    """Likewise of each retention set, by name."""
    near_duplicates: list[NearPairs] = field(default_factory=list)
    """Of the validation set and of each retention set."""
    unused_fields: dict[str, dict[str, int]] = field(default_factory=dict)
    """By name of a set that is trained on or measured, the fields of its rows that are in no token, with the number of
    rows that have them."""


def describe(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    layout: SequenceLayout,
    overlap: Overlap | None = None,
    retention_overlap: Mapping[str, Overlap] | None = None,
    unused: Mapping[str, dict[str, int]] | None = None,
) -> DataReport:
    """Tokenizes every row once and keeps none but those that are shown."""
    documents = isinstance(rows[0], Text)
    shown = set(np.linspace(0, len(rows) - 1, min(RENDERED, len(rows))).round().astype(int).tolist())
    lengths, sizes, rendered = [], [], []
    labels = truncated = truncated_labels = 0
    keys: set[bytes] = set()
    characters: Counter[str] = Counter()
    for number, (row, whole) in enumerate(zip(rows, untruncated_examples(rows, tokenizer, layout.loss_on))):
        cut = whole if documents else whole.cut(layout.sequence_length + 1)
        lengths.append(len(whole.ids))
        labels += cut.num_labels
        truncated += len(cut.ids) < len(whole.ids)
        truncated_labels += whole.num_labels - cut.num_labels
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
    """Rows by the name of a field of theirs that is in no token."""
    return dict(
        Counter(name for row in rows if isinstance(row, Conversation) for name in unused_fields(row, tokenizer))
    )


def quantiles(lengths: Sequence[int] | npt.NDArray[np.int64]) -> dict[str, int]:
    return {name: int(np.quantile(lengths, part, method="inverted_cdf")) for name, part in QUANTILES.items()}


def stream_sizes(tokens: int, sequence_length: int, *, bos: bool) -> list[int]:
    """Positions of the sequences that documents are joined and cut to (examples.py). ``tokens``: of all documents, with
    their end-of-text and, if ``bos``, their BOS; without one, an end-of-text goes before the first."""
    full, rest = divmod(tokens - bos, sequence_length)
    return [sequence_length] * full + [rest] * (rest > 0)


def sequences(sizes: list[int], layout: SequenceLayout, *, documents: bool) -> tuple[dict[str, int], dict[str, float]]:
    """``DataReport.sequences`` and ``padding``; ``sizes`` are positions, of rows or of joined documents."""
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
    """Each bin twice as wide as the one before, from the shortest's to the longest's."""
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
    return "".join(parts) + (f" … and {more:,} tokens more" if more else "")
