"""Rows of JSON Lines files, each checked where it stands. No torch."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.data import DataConfig, DemoDataConfig, FileDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.tasks import PretrainConfig, TaskConfig
from qwen_cl.data.conversations import Conversation, check_text, parse_conversation
from qwen_cl.data.lines import numbered_lines, parse_object

KEYS = "data.path (and data.validation_path)"


@dataclass(frozen=True, slots=True)
class Text:
    text: str


Row = Conversation | Text


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFiles:
    """Where a run's rows are and how to read them; plain values, so that a recipe can carry them."""

    train: str
    validation: str | None
    validation_every: int
    """Without a validation file, every n-th row of ``train`` is held out."""
    fields: tuple[str, ...]
    """(prompt, completion) for instructions, (text,) for raw text."""


def row_files(data: DataConfig, task: TaskConfig) -> RowFiles | None:
    """The files behind a data config; None for random tokens, which have none."""
    raw_text = isinstance(task, PretrainConfig)
    if isinstance(data, DemoDataConfig):
        stem = data.text if raw_text else data.instructions
        return RowFiles(
            train=f"{stem}.train.jsonl",
            validation=f"{stem}.validation.jsonl",
            validation_every=2,
            fields=("text",) if raw_text else ("prompt", "completion"),
        )
    if isinstance(data, FileDataConfig):
        return RowFiles(
            train=str(Path(data.path).expanduser().absolute()),
            validation=None
            if data.validation_path is None
            else str(Path(data.validation_path).expanduser().absolute()),
            validation_every=data.validation_every,
            fields=(data.text_field,) if raw_text else (data.prompt_field, data.completion_field),
        )
    return None


def read_rows(files: RowFiles) -> tuple[list[Row], list[Row]]:
    """Training and validation rows.

    Raises:
        UserError: names file and line of the first row that is not as it must be, or the file that has none.
    """
    train = list(read_file(Path(files.train), files.fields, KEYS))
    if files.validation is not None:
        return train, list(read_file(Path(files.validation), files.fields, KEYS))
    held_out = train[:: files.validation_every]
    kept = [row for number, row in enumerate(train) if number % files.validation_every]
    if not kept:
        raise UserError(f"{files.train} has one row, which leaves none to validate on; set data.validation_path")
    return kept, held_out


def row_location(files: RowFiles, index: int, *, validation: bool) -> str:
    """FILE:LINE of a row that :func:`read_rows` returned, by its index there. Reads the file again."""
    path, number = files.train, index
    if validation and files.validation is not None:
        path = files.validation
    elif validation:
        number = index * files.validation_every
    elif files.validation is None:
        number = index + index // (files.validation_every - 1) + 1
    with open(path, "rb") as stream:
        lines = (line for line, content in enumerate(stream, start=1) if content.strip())
        return f"{path}:{next(itertools.islice(lines, number, None))}"


def content_hash(files: RowFiles) -> str:
    """sha256 over the files' bytes, training file first."""
    digest = hashlib.sha256()
    for name in filter(None, (files.train, files.validation)):
        with open(name, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_file(path: Path, fields: tuple[str, ...], key: str) -> Iterator[Row]:
    """``key`` says what to set to another file."""
    content = f"one JSON object a line with the fields {', '.join(fields)}"
    for line, where in numbered_lines(path, f"{key} to JSON Lines files", content):
        value = parse_object(line, where, ", ".join(fields))
        yield (
            parse_conversation(value, (fields[0], fields[1]), where)
            if len(fields) == 2
            else _text(value, fields[0], where)
        )


def _text(value: dict[str, Any], field: str, where: str) -> Text:
    if field not in value:
        raise missing_field(value, field, where)
    return Text(check_text(value[field], f"field {field!r}", where))


def missing_field(
    found: Iterable[str], field: str, where: str, fix: str = "rename it, or set data.text_field"
) -> UserError:
    names = ", ".join(map(repr, found)) or "none"
    return UserError(f"{where}: field {field!r} is missing (found: {names}); {fix}")
