"""Named evaluation sets: their rows, examples and byte counts. No torch."""

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
    """The rows of a named set, as read from its files."""

    name: str
    path: str
    rows: list[Row]
    """All conversations, or all texts."""
    places: list[str]
    """FILE:LINE of each row."""

    @property
    def is_text(self) -> bool:
        return isinstance(self.rows[0], Text)


@dataclass(frozen=True, slots=True)
class ScoredSet:
    """The examples of an evaluation set, with the byte count that bits per byte divides by."""

    name: str
    examples: Sequence[Example]
    rows: int
    num_bytes: int
    """UTF-8 bytes of the evaluated text: all of raw text, as in the file; the decoded loss tokens of conversations,
    without special tokens. The loss includes special tokens, since ending an answer well is part of the task."""


def read_sets(files: Mapping[str, str], key: str) -> list[NamedSet]:
    """Read named sets; ``key`` is the config key that lists their files, like ``task.sets``.

    Raises:
        UserError: a file or line cannot be read.
    """
    return [NamedSet(name, path, *read_set_rows(path, f"{key}.{name}")) for name, path in files.items()]


def local_sets(files: Mapping[str, str], key: str) -> dict[str, str]:
    """Return absolute local paths, valid on other nodes of a shared filesystem without a network. Raises UserError."""
    return {name: local_path(path, f"{key}.{name}") for name, path in files.items()}


def score_set(named: NamedSet, tokenizer: PreTrainedTokenizerBase, sequence_length: int, loss_on: LossOn) -> ScoredSet:
    """Return the evaluation set of these rows, encoded as in training.

    Raises:
        UserError: it has no loss tokens.
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
