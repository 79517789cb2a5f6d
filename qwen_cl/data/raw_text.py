"""How raw text becomes tokens: one rule for training, measuring, sampling, continuing and comparing. No torch."""

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
    """What the tokenizer puts before a text by itself; None where it puts nothing there, or the end-of-text token,
    which then stands once between two documents."""
    eos_id: int

    @property
    def first_id(self) -> int:
        """What a stream of documents starts with; never a label."""
        return self.eos_id if self.bos_id is None else self.bos_id


def document_delimiters(tokenizer: PreTrainedTokenizerBase) -> Delimiters:
    """Asks the tokenizer itself: one that has a BOS token need not use it, and its files say it in several ways.

    Raises:
        UserError: it puts several tokens before a text.
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
    """Ids of the text alone. What reads like a special token is the letters it is written with."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text to be continued: with what the tokenizer puts before it, without what it may put after."""
    return [*_added_before(tokenizer), *encode_text(tokenizer, text)]


def spans_without(length: int, uncounted: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of [1, length) without these indices, which rise."""
    spans, start = [], 1
    for index in uncounted:
        if start < index:
            spans.append((start, index))
        start = max(start, index + 1)
    return (*spans, (start, length)) if start < length else tuple(spans)


def _added_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = list(tokenizer(PROBE)["input_ids"])
    plain = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    if not plain:  # a vocabulary that the probe is not in
        return added[: -1 if added[-1:] == [tokenizer.eos_token_id] and len(added) > 1 else None]
    places = range(len(added) - len(plain) + 1)
    start = next((place for place in places if added[place : place + len(plain)] == plain), 0)
    return added[:start]
