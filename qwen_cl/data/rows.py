"""Rows of files, each checked where it stands. No torch."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.data import DataConfig, DemoDataConfig, FileDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.tasks import PretrainConfig, TaskConfig
from qwen_cl.data.conversations import Conversation, check_text, parse_conversation
from qwen_cl.data.corpus.documents import read_records
from qwen_cl.data.corpus.files import Format, find_files, hash_files
from qwen_cl.data.corpus.record import Record
from qwen_cl.data.fields import missing_field

PLACES = "or hf://datasets/ORG/NAME"


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
    train = _read_all(files, "data.path", files.train)
    if files.validation is not None:
        return train, _read_all(files, "data.validation_path", files.validation)
    held_out = train[:: files.validation_every]
    kept = [row for number, row in enumerate(train) if number % files.validation_every]
    if not kept:
        raise UserError(f"{files.train} has one row, which leaves none to validate on; set data.validation_path")
    return kept, held_out


def row_location(files: RowFiles, index: int, *, validation: bool) -> str:
    """Where a row stands that :func:`read_rows` returned, by its index there. Reads the files again."""
    key, path, number = "data.path", files.train, index
    if validation and files.validation is not None:
        key, path = "data.validation_path", files.validation
    elif validation:
        number = index * files.validation_every
    elif files.validation is None:
        number = index + index // (files.validation_every - 1) + 1
    return next(itertools.islice(_records(files, key, path), number, None)).where


def content_hash(files: RowFiles) -> str:
    """sha256 over the files' bytes, training file first; where a path means several, over the hash of them all."""
    digest = hashlib.sha256()
    for key, path in (("data.path", files.train), ("data.validation_path", files.validation)):
        if path is None:
            continue
        names = [file.path for file in find_files(path, key, PLACES)]
        if len(names) > 1:
            digest.update(hash_files(names).encode())
            continue
        with names[0].open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read_all(files: RowFiles, key: str, path: str) -> list[Row]:
    rows = [_row(record, files.fields) for record in _records(files, key, path)]
    if not rows:
        raise UserError(f"{path} is empty; it must hold rows with the fields {', '.join(files.fields)}")
    return rows


def _records(files: RowFiles, key: str, path: str) -> Iterator[Record]:
    found = find_files(path, key, PLACES)
    if len(files.fields) > 1 and (texts := [file for file in found if file.format is Format.text]):
        raise UserError(
            f"{key}: {texts[0].path} is raw text, for task=pretrain; task=finetune takes rows with fields (let a file "
            "of JSON Lines end with .jsonl)"
        )
    return read_records(found, ", ".join(files.fields))


def _row(record: Record, fields: tuple[str, ...]) -> Row:
    row = dict(record.fields)
    if len(fields) == 2:
        return parse_conversation(row, (fields[0], fields[1]), record.where)
    return _text(row, fields[0], record.where)


def _text(value: dict[str, Any], field: str, where: str) -> Text:
    if field not in value:
        raise missing_field(value, field, where)
    return Text(check_text(value[field], f"field {field!r}", where))
