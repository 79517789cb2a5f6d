"""Rows as token sequences with their loss tokens. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import LossOn
from qwen_cl.data.chat.conversations import Conversation
from qwen_cl.data.chat.encode import check_conversation, render_conversation
from qwen_cl.data.raw_text import Delimiters, document_delimiters, encode_text, spans_without
from qwen_cl.data.rows import Row, Text
from qwen_cl.models.tokenizer.normalized import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Example:
    """A token sequence of one or more segments that do not attend to each other, with its loss tokens."""

    ids: list[int]
    """Token ids; every id but the first of a segment is the label of the id before it."""
    loss_spans: tuple[tuple[int, int], ...]
    """Half-open ranges of indices in ``ids`` of the loss tokens, in order; never the first id of a segment."""
    starts: tuple[int, ...] = (0,)
    """Index in ``ids`` where each segment starts."""

    @property
    def num_labels(self) -> int:
        return sum(stop - start for start, stop in self.loss_spans)

    @property
    def num_positions(self) -> int:
        """The number of input positions: all ids but the last of each segment."""
        return len(self.ids) - len(self.starts)

    def segments(self) -> Iterator[tuple[int, int]]:
        """Yield the half-open range of indices in ``ids`` of each segment."""
        return zip(self.starts, [*self.starts[1:], len(self.ids)])

    def cut(self, length: int) -> Example:
        """Return the first ``length`` ids of a single-segment example, with the loss tokens among them."""
        spans = tuple((start, min(stop, length)) for start, stop in self.loss_spans if start < length)
        return Example(self.ids[:length], spans)


def build_examples(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, sequence_length: int, loss_on: LossOn = LossOn.assistant
) -> Iterator[Example]:
    """Yield one example per conversation, truncated; texts are joined, each with its BOS and end-of-text token, and cut
    into sequences of full length."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    everything = itertools.chain([first], rows)
    if isinstance(first, Text):
        yield from _pack(everything, tokenizer, sequence_length)
    else:
        for example in untruncated_examples(everything, tokenizer, loss_on):
            yield example.cut(sequence_length + 1)


def untruncated_examples(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Iterator[Example]:
    """Yield one example per row, of any length."""
    delimiters = None
    for row in rows:
        if isinstance(row, Conversation):
            ids, answers = render_conversation(row, tokenizer, loss_on)
            yield Example(ids, answers)
            continue
        delimiters = delimiters or document_delimiters(tokenizer)
        ids = _document(row, tokenizer, delimiters)
        yield Example(ids, spans_without(len(ids), []))


def check_examples(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, sequence_length: int, loss_on: LossOn, path: str
) -> None:
    """Refuse rows that cannot be rendered, naming FILE:LINE, and sets without loss tokens."""
    for row in rows:
        if isinstance(row, Conversation):
            check_conversation(row, tokenizer, loss_on)
    check_labels(rows, tokenizer, sequence_length, loss_on, path)


def check_labels(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, sequence_length: int, loss_on: LossOn, path: str
) -> None:
    """Refuse rows without loss tokens: all answers are truncated away, or have weight 0.

    Stops at the first example with a loss token, so valid data costs nothing.
    """
    if any(example.num_labels for example in build_examples(rows, tokenizer, sequence_length, loss_on)):
        return
    if not any(example.num_labels for example in untruncated_examples(rows, tokenizer, loss_on)):
        raise UserError(f"{path}: no row has loss tokens: all answers have weight 0; give one weight 1")
    raise UserError(
        f"{path}: no row has loss tokens within task.sequence_length ({sequence_length}): every prompt alone is "
        "longer; raise task.sequence_length or shorten the prompts"
    )


def _pack(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Iterator[Example]:
    """Yield the sequences of joined texts. Each text begins with the tokenizer's BOS; without one, an end-of-text token
    precedes the first text too. Consecutive sequences share one token, so that every token of the texts is a label
    exactly once."""
    delimiters = document_delimiters(tokenizer)
    buffer: list[int] = [] if delimiters.bos_id is not None else [delimiters.eos_id]
    bos_places: list[int] = []
    for row in rows:
        assert isinstance(row, Text)
        if delimiters.bos_id is not None:
            bos_places.append(len(buffer))
        buffer += _document(row, tokenizer, delimiters)
        start = 0
        while len(buffer) - start > sequence_length:
            stop = start + sequence_length + 1
            within = [place - start for place in bos_places if start <= place < stop]
            yield Example(buffer[start:stop], spans_without(stop - start, within))
            start += sequence_length
        buffer, bos_places = buffer[start:], [place - start for place in bos_places if place >= start]
    if len(buffer) > 1:
        yield Example(buffer, spans_without(len(buffer), bos_places))


def _document(row: Text, tokenizer: PreTrainedTokenizerBase, delimiters: Delimiters) -> list[int]:
    bos = [] if delimiters.bos_id is None else [delimiters.bos_id]
    return [*bos, *encode_text(tokenizer, row.text), delimiters.eos_id]


def load_data_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory, from its files alone.

    Raises:
        UserError: the directory has no readable tokenizer, or it has no end-of-text token.
    """
    tokenizer = open_tokenizer(Path(directory))
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: its tokenizer names no eos_token; set it in tokenizer_config.json")
    return tokenizer
