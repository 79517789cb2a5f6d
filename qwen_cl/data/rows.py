"""Rows of JSON Lines files, each checked where it stands. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.data import DataConfig, DemoDataConfig, FileDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.tasks import PretrainConfig, TaskConfig
from qwen_cl.data.conversations import Conversation, check_text, parse_conversation


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
    train = list(_read_file(Path(files.train), files.fields))
    if files.validation is not None:
        return train, list(_read_file(Path(files.validation), files.fields))
    held_out = train[:: files.validation_every]
    kept = [row for number, row in enumerate(train) if number % files.validation_every]
    if not kept:
        raise UserError(f"{files.train} has one row, which leaves none to validate on; set data.validation_path")
    return kept, held_out


def content_hash(files: RowFiles) -> str:
    """sha256 over the files' bytes, training file first."""
    digest = hashlib.sha256()
    for name in filter(None, (files.train, files.validation)):
        with open(name, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read_file(path: Path, fields: tuple[str, ...]) -> Iterator[Row]:
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; set data.path (and data.validation_path) to JSON Lines files"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    found = False
    with stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                found = True
                yield _parse(line, f"{path}:{number}", fields)
    if not found:
        raise UserError(f"{path} is empty; it must hold one JSON object a line with the fields {', '.join(fields)}")


def _parse(line: bytes, where: str, fields: tuple[str, ...]) -> Row:
    value = parse_object(line, where, fields)
    if len(fields) == 2:
        return parse_conversation(value, (fields[0], fields[1]), where)
    (field,) = fields
    if field not in value:
        raise missing_field(value, field, where)
    return Text(check_text(value[field], f"field {field!r}", where))


def parse_object(line: bytes, where: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """A line of JSON Lines. Raises UserError where it is no object, saying which ``fields`` it should have."""
    try:
        value = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise not_utf8(where, line[error.start], error.start + 1) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); every line is one object") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deep; every line is one object of texts") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {type(value).__name__} where an object with {', '.join(fields)} must be")
    return value


def not_utf8(where: str, byte: int, column: int) -> UserError:
    return UserError(
        f"{where}: byte 0x{byte:02x} at column {column} is not UTF-8; convert the file, "
        "for example with: iconv -f SHIFT_JIS -t UTF-8"
    )


def missing_field(found: Iterable[str], field: str, where: str) -> UserError:
    names = ", ".join(map(repr, found)) or "none"
    return UserError(f"{where}: field {field!r} is missing (found: {names}); rename it, or set data.text_field")
