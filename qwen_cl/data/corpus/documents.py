"""Documents of raw text, in order, checked with FILE:LINE in every error. No torch."""

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
    """The source of a text, as configured; plain values."""

    key: str
    """Config key for messages: ``data.path``."""
    path: str
    text_field: str
    split: str
    """Split of a Hub dataset."""
    subset: str | None
    """Subset of a Hub dataset."""
    separator: DocumentSeparator = DocumentSeparator.file
    """Separator of documents in text files."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document of raw text."""

    text: str
    """Text; empty if the source has only whitespace."""
    where: str
    progress: int
    """``where`` and ``progress`` are those of the record."""


def read_files(
    files: Iterable[InputFile], text_field: str, separator: DocumentSeparator = DocumentSeparator.file
) -> Iterator[Document]:
    """Yield the documents of files.

    Raises:
        UserError: names file and line of the first invalid record.
    """
    return map(functools.partial(to_document, field=text_field), read_records(files, text_field, separator))


def read_records(
    files: Iterable[InputFile], text_field: str | None, separator: DocumentSeparator = DocumentSeparator.file
) -> Iterator[Record]:
    """Yield the records of files: documents of text files with the single field ``text_field``, JSON objects, or table
    rows. If ``text_field`` is None, all fields are read, and that of text files is ``text``.

    Raises:
        UserError: names file and line of the first unreadable record.
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
    """Return a row's text, empty if it is blank. Raises UserError if it is missing or cannot be tokenized."""
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
