"""Tokenization of raw text, shared by training, evaluation, generation and overlap detection. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_cl.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "x"


@dataclass(frozen=True, slots=True)
class Delimiters:
    """The tokens around each document."""

    bos_id: int | None
    """The token that the tokenizer prepends to a text; None if it prepends nothing, or the end-of-text token, which
    then separates documents once."""
    eos_id: int

    @property
    def first_id(self) -> int:
        """The first token of a stream of documents; never a label."""
        return self.eos_id if self.bos_id is None else self.bos_id


def document_delimiters(tokenizer: PreTrainedTokenizerBase) -> Delimiters:
    """Return the delimiters by running the tokenizer: one that has a BOS token need not add it.

    Raises:
        UserError: the tokenizer adds several tokens before a text.
    """
    eos_id = int(tokenizer.eos_token_id)
    before = _added_before(tokenizer)
    if len(before) > 1:
        shown = " ".join(tokenizer.convert_ids_to_tokens(before))
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer puts {len(before)} tokens before a text ({shown}), and raw text "
            "can begin with one at most; take the others out of the post_processor of its tokenizer.json"
        )
    return Delimiters(None if not before or before[0] == eos_id else before[0], eos_id)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of the text alone. Names of special tokens in it are encoded as ordinary text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text to continue: with the tokens prepended by the tokenizer, without appended ones."""
    return [*_added_before(tokenizer), *encode_text(tokenizer, text)]


def spans_without(length: int, excluded: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return the half-open ranges of [1, length) without the excluded indices, which are ascending."""
    spans, start = [], 1
    for index in excluded:
        if start < index:
            spans.append((start, index))
        start = max(start, index + 1)
    return (*spans, (start, length)) if start < length else tuple(spans)


def _added_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = list(tokenizer(PROBE)["input_ids"])
    plain = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    if not plain:  # the vocabulary lacks the probe
        return added[: -1 if added[-1:] == [tokenizer.eos_token_id] and len(added) > 1 else None]
    places = range(len(added) - len(plain) + 1)
    start = next((place for place in places if added[place : place + len(plain)] == plain), 0)
    return added[:start]
