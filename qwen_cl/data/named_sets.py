"""Evaluation sets by name: what is in their files, what of it counts, and how many bytes that is. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_cl.config.errors import UserError
from qwen_cl.config.tasks import LossOn
from qwen_cl.data.conversations import check_text
from qwen_cl.data.examples import Example, build_examples, check_examples
from qwen_cl.data.lines import decode, numbered_lines, parse_object
from qwen_cl.data.rows import Row, Text, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TARGET = "val/target"
"""What the metrics of the target's own validation set start with."""


@dataclass(frozen=True, slots=True)
class NamedSet:
    name: str
    path: Path
    rows: list[Row]
    """All of one kind."""

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
    return [_read_set(f"{key}.{name}", name, expanded(path)) for name, path in files.items()]


def absolute_sets(files: Mapping[str, str]) -> dict[str, str]:
    return {name: str(expanded(path)) for name, path in files.items()}


def expanded(path: str) -> Path:
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 - Path's raises on an unknown user


def score_set(named: NamedSet, tokenizer: PreTrainedTokenizerBase, sequence_length: int, loss_on: LossOn) -> ScoredSet:
    """The same examples as in training.

    Raises:
        UserError: nothing of it would count.
    """
    check_examples(named.rows, tokenizer, sequence_length, loss_on, str(named.path))
    built = build_examples(named.rows, tokenizer, sequence_length, loss_on)
    examples = [example for example in built if example.num_labels]
    num_bytes = _text_bytes(named.rows) if named.is_text else _label_bytes(examples, tokenizer)
    return ScoredSet(named.name, examples, len(named.rows), num_bytes)


def _read_set(key: str, name: str, path: Path) -> NamedSet:
    if path.suffix == ".txt":
        return NamedSet(name, path, [Text(check_text(_whole_text(path, key), "the text", str(path)))])
    if path.suffix != ".jsonl":
        raise UserError(f"{key} ({path}) must be a .jsonl file (a row a line) or a .txt file (one document)")
    line, where = next(numbered_lines(path, f"{key} to a file of rows", "one JSON object a line"))
    is_text = "text" in parse_object(line, where, "text, or of an instruction form,")
    return NamedSet(name, path, list(read_file(path, ("text",) if is_text else ("prompt", "completion"), key)))


def _whole_text(path: Path, key: str) -> str:
    next(numbered_lines(path, f"{key} to a text file", "a text"))  # there, and not blank
    with path.open("rb") as stream:
        return "".join(decode(line, f"{path}:{number}") for number, line in enumerate(stream, start=1))


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
        for start, stop in example.counted
    )
