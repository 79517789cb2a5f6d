"""Evaluation sets by name: what is in their files, what of it counts, and how many bytes that is. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_cl.config.task.training import LossOn
from qwen_cl.data.examples import Example, build_examples, check_labels
from qwen_cl.data.rows import Row, Text
from qwen_cl.data.set_files import local_path, read_set_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class NamedSet:
    name: str
    path: str
    rows: list[Row]
    """All of one kind."""
    places: list[str]
    """FILE:LINE of each row."""

    @property
    def is_text(self) -> bool:
        return isinstance(self.rows[0], Text)


@dataclass(frozen=True, slots=True)
class ScoredSet:
    """What a loss over the set is summed over, and what it is divided by."""

    name: str
    examples: Sequence[Example]
    rows: int
    num_bytes: int
    """UTF-8 bytes of the text that counts. Of raw text that is all of it, as it is in the file; of conversations, what
    the counted tokens say, without the special ones. The loss has the special tokens too: a model that needs fewer
    nats to end an answer is better at it."""


def read_sets(files: Mapping[str, str], key: str) -> list[NamedSet]:
    """``key`` is where the files are named, like ``task.sets``.

    Raises:
        UserError: a file cannot be read, with the line.
    """
    return [NamedSet(name, path, *read_set_rows(path, f"{key}.{name}")) for name, path in files.items()]


def local_sets(files: Mapping[str, str], key: str) -> dict[str, str]:
    """Paths that mean the same to a process elsewhere, without a network. Raises UserError."""
    return {name: local_path(path, f"{key}.{name}") for name, path in files.items()}


def score_set(named: NamedSet, tokenizer: PreTrainedTokenizerBase, sequence_length: int, loss_on: LossOn) -> ScoredSet:
    """The same examples as in training.

    Raises:
        UserError: nothing of it would count.
    """
    check_labels(named.rows, tokenizer, sequence_length, loss_on, named.path)
    built = build_examples(named.rows, tokenizer, sequence_length, loss_on)
    examples = [example for example in built if example.num_labels]
    num_bytes = _text_bytes(named.rows) if named.is_text else _label_bytes(examples, tokenizer)
    return ScoredSet(named.name, examples, len(named.rows), num_bytes)


def _text_bytes(rows: Sequence[Row]) -> int:
    return sum(len(row.text.encode()) for row in rows if isinstance(row, Text))


def _label_bytes(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    return sum(
        len(
            tokenizer.decode(
                example.ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
            ).encode()
        )
        for example in examples
        for start, stop in example.loss_spans
    )
