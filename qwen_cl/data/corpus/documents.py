"""The documents of raw text, in order, each checked where it stands. No torch."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_cl.config.data import TEXT, DocumentSeparator
from qwen_cl.data.chat.conversations import check_text
from qwen_cl.data.corpus.files import Format, InputFile
from qwen_cl.data.corpus.json_records import read_json
from qwen_cl.data.corpus.parquet_records import read_parquet
from qwen_cl.data.corpus.record import Record
from qwen_cl.data.corpus.tables import read_table
from qwen_cl.data.corpus.text_files import read_text
from qwen_cl.data.fields import missing_field_error


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """What a config says of one text; plain values."""

    key: str
    """How messages call it: ``data.path``."""
    path: str
    text_field: str
    split: str
    """Of a dataset on the Hub."""
    subset: str | None
    """Of a dataset on the Hub."""
    separator: DocumentSeparator = DocumentSeparator.file
    """Of text files."""


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    """Empty where the source has blanks alone."""
    where: str
    progress: int
    """Both as of its record."""


def read_files(
    files: Iterable[InputFile], text_field: str, separator: DocumentSeparator = DocumentSeparator.file
) -> Iterator[Document]:
    """The texts of the records.

    Raises:
        UserError: names file and line of the first that is not as it must be.
    """
    return map(functools.partial(to_document, field=text_field), read_records(files, text_field, separator))


def read_records(
    files: Iterable[InputFile], text_field: str | None, separator: DocumentSeparator = DocumentSeparator.file
) -> Iterator[Record]:
    """A document of a text file is one record, with the one field ``text_field``; an object of JSON or a row of a table
    another. Where ``text_field`` is None, all fields are wanted, and that of a text file is ``text``.

    Raises:
        UserError: names file and line of the first that cannot be read.
    """
    before = 0
    for file in files:
        is_text = file.format is Format.text
        for record in (
            read_text(file, text_field or TEXT, separator) if is_text else READERS[file.format](file, text_field)
        ):
            yield Record(record.fields, record.where, before + record.progress)
        before += file.size


def to_document(record: Record, field: str) -> Document:
    return Document(take_text(record.fields, field, record.where), record.where, record.progress)


def take_text(row: Mapping[str, Any], field: str, where: str) -> str:
    """A row's text, empty where it is blank. Raises UserError where it has none, or none that can be tokenized."""
    if field not in row:
        raise missing_field_error(row, field, where)
    value = row[field]
    if isinstance(value, str) and not value.strip():
        return ""
    return check_text(value, f"field {field!r}", where)


READERS = {
    Format.json_lines: read_json,
    Format.csv: read_table,
    Format.tsv: read_table,
    Format.parquet: read_parquet,
}
