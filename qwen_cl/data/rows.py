"""Rows of data files, checked with FILE:LINE in every error. No torch."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_cl.config.data import PAIR, TEXT, DataConfig, DemoDataConfig, FileDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import PretrainConfig, TaskConfig
from qwen_cl.data.chat.conversations import Conversation, check_text, parse_conversation
from qwen_cl.data.corpus.documents import read_records
from qwen_cl.data.corpus.files import Format, find_files, hash_files
from qwen_cl.data.corpus.hub_dataset import is_hub_dataset, parse_reference
from qwen_cl.data.corpus.record import Record
from qwen_cl.data.fields import KEY, missing_field_error, name_rows
from qwen_cl.data.hub_copy import copy_of, pin_dataset
from qwen_cl.files.hashing import hash_file

VALIDATION_SPLIT = "validation"
"""Default split of data.validation_path on the Hub."""
PLACES = "or hf://datasets/ORG/NAME"


@dataclass(frozen=True, slots=True)
class Text:
    """A document of raw text."""

    text: str


Row = Conversation | Text


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFiles:
    """The data files of a run and how to read them; plain values, so that a recipe can carry them."""

    train: str
    validation: str | None
    validation_every: int
    """Without a validation file, every n-th row of ``train`` is held out."""
    raw_text: bool
    """The rows are texts, not conversations."""
    fields: dict[str, str]
    """Field names in the files, by standard name (fields.py)."""
    moved: tuple[int, ...] = ()
    """Numbers of held-out rows, from 0, that were moved to training, ascending (leakage.py)."""

    def validates(self, number: int) -> bool:
        """Return True if the row of this number is held out; only for runs without validation files."""
        return number % self.validation_every == 0 and number not in self.moved


def pin_rows(data: DataConfig) -> DataConfig:
    """Return the config with its Hub datasets pinned to a commit, after making local copies of them.

    Raises:
        UserError: a dataset cannot be read.
    """
    if not isinstance(data, FileDataConfig):
        return data
    path, validation = data.path, data.validation_path
    if is_hub_dataset(path):
        path = pin_dataset(path, "data.path", subset=data.subset)
    if validation is not None and is_hub_dataset(validation):
        validation = pin_dataset(validation, "data.validation_path", split=VALIDATION_SPLIT, subset=data.subset)
    if data.subset is not None and not any(is_hub_dataset(each) for each in (path, validation or "")):
        raise UserError(f"data.subset ({data.subset}) has no effect: data.path is not a dataset on the Hub; remove it")
    return replace(data, path=path, validation_path=validation)


def dataset_commits(data: DataConfig) -> dict[str, str]:
    """Return the commit of each Hub dataset of a pinned config, by config key."""
    paths = {} if not isinstance(data, FileDataConfig) else {"path": data.path, "validation_path": data.validation_path}
    return {
        f"data.{name}": str(parse_reference(path, name).revision)
        for name, path in paths.items()
        if path is not None and is_hub_dataset(path)
    }


def row_files(data: DataConfig, task: TaskConfig) -> RowFiles | None:
    """Return the files of a data config with pinned datasets; None for random tokens."""
    raw_text = isinstance(task, PretrainConfig)
    if isinstance(data, DemoDataConfig):
        stem = data.text if raw_text else data.instructions
        return RowFiles(
            train=f"{stem}.train.jsonl",
            validation=f"{stem}.validation.jsonl",
            validation_every=2,
            raw_text=raw_text,
            fields={},
        )
    if isinstance(data, FileDataConfig):
        return RowFiles(
            train=_local(data.path),
            validation=None if data.validation_path is None else _local(data.validation_path),
            validation_every=data.validation_every,
            raw_text=raw_text,
            fields=_columns(data, raw_text),
        )
    return None


def read_rows(files: RowFiles) -> tuple[list[Row], list[Row]]:
    """Read the training and validation rows.

    Raises:
        UserError: names file and line of the first invalid row, or the file without rows.
    """
    train = _read_all(files, "data.path", files.train)
    if files.validation is not None:
        return train, _read_all(files, "data.validation_path", files.validation)
    training: list[Row] = []
    held_out: list[Row] = []
    for number, row in enumerate(train):
        (held_out if files.validates(number) else training).append(row)
    if not training:
        other = ", or use data=text, which cuts texts" if files.raw_text else ""
        raise UserError(f"{files.train} has one row, which leaves none to train on; set data.validation_path{other}")
    return training, held_out


def row_location(files: RowFiles, index: int, *, validation: bool) -> str:
    """Return the FILE:LINE of a row of :func:`read_rows` by its index there. Reads the files again."""
    key, path, number = "data.path", files.train, index
    if validation and files.validation is not None:
        key, path = "data.validation_path", files.validation
    elif files.validation is None:
        numbers = (number for number in itertools.count() if files.validates(number) is validation)
        number = next(itertools.islice(numbers, index, None))
    return next(itertools.islice(_records(files, key, path), number, None)).where


def content_hash(files: RowFiles) -> str:
    """Return the sha256 of the files' bytes, training file first; a path with several files enters by their hash."""
    digest = hashlib.sha256()
    for key, path in (("data.path", files.train), ("data.validation_path", files.validation)):
        if path is None:
            continue
        names = [file.path for file in find_files(path, key, PLACES)]
        if len(names) > 1:
            digest.update(hash_files(names).encode())
        else:
            hash_file(names[0], digest)
    return digest.hexdigest()


def conversations(
    records: Iterable[Record], columns: Mapping[str, str], path: str, key: str = KEY
) -> Iterator[Conversation]:
    """Yield the conversation of each record of ``path``; see :func:`name_rows`. Raises UserError."""
    for row in name_rows(records, columns, path, key):
        try:
            found = parse_conversation(row.fields, PAIR, row.where)
            yield replace(found, unused=(*found.unused, *row.left_out)) if row.left_out else found
        except UserError as error:
            raise row.with_original_names(error) from error


def _local(path: str) -> str:
    return str(copy_of(path) if is_hub_dataset(path) else Path(os.path.expanduser(path)).absolute())  # noqa: PTH111


def _columns(data: FileDataConfig, raw_text: bool) -> dict[str, str]:
    """Return the configured field names that the task reads; old keys of the other task have no effect."""
    for name in data.fields:
        if (name == TEXT) is not raw_text:
            raise UserError(
                f"data.fields.{name} is a field of {'texts' if name == TEXT else 'conversations'}, which "
                f"task={'pretrain' if raw_text else 'finetune'} does not read; remove it"
            )
    return {name: column for name, column in data.columns.items() if (name == TEXT) is raw_text}


def _read_all(files: RowFiles, key: str, path: str) -> list[Row]:
    records = _records(files, key, path)
    if files.raw_text:
        column = files.fields.get(TEXT, TEXT)
        rows: list[Row] = [_text(record, column) for record in records]
    else:
        rows = list(conversations(records, files.fields, path))
    if not rows:
        raise UserError(f"{path} is empty; it must hold rows{' of texts' if files.raw_text else ', of conversations'}")
    return rows


def _records(files: RowFiles, key: str, path: str) -> Iterator[Record]:
    found = find_files(path, key, PLACES)
    if files.raw_text:
        return read_records(found, files.fields.get(TEXT, TEXT))
    if texts := [file for file in found if file.format is Format.text]:
        raise UserError(
            f"{key}: {texts[0].path} is raw text, for task=pretrain; task=finetune takes rows with fields (let a file "
            "of JSON Lines end with .jsonl)"
        )
    return read_records(found, None)


def _text(record: Record, column: str) -> Text:
    if column not in record.fields:
        raise missing_field_error(record.fields, column, record.where)
    return Text(check_text(record.fields[column], f"field {column!r}", record.where))
