"""The documents of raw text, in order, each checked where it stands. No torch."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.conversations import check_text
from qwen_cl.data.corpus.files import Format, InputFile, opened
from qwen_cl.data.lines import decode, not_utf8, parse_object
from qwen_cl.data.rows import missing_field

BATCH_ROWS = 1024


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


@dataclass(frozen=True, slots=True)
class Record:
    fields: Mapping[str, Any]
    where: str
    """For messages: ``FILE``, ``FILE:LINE`` or ``FILE: row N``."""
    progress: int
    """Bytes of all files read up to its end, roughly; of a dataset on the Hub, rows."""


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    """Empty where the source has blanks alone."""
    where: str
    progress: int
    """Both as of its record."""


def read_files(files: Iterable[InputFile], text_field: str) -> Iterator[Document]:
    """The texts of the records.

    Raises:
        UserError: names file and line of the first that is not as it must be.
    """
    return map(functools.partial(to_document, field=text_field), read_records(files, text_field))


def read_records(files: Iterable[InputFile], text_field: str) -> Iterator[Record]:
    """A text file is one record, with the one field ``text_field``; a line of JSON Lines or a row of Parquet another.

    Raises:
        UserError: names file and line of the first that cannot be read.
    """
    before = 0
    for file in files:
        for record in READERS[file.format](file, text_field):
            yield Record(record.fields, record.where, before + record.progress)
        before += file.size


def to_document(record: Record, field: str) -> Document:
    return Document(take_text(record.fields, field, record.where), record.where, record.progress)


def take_text(row: Mapping[str, Any], field: str, where: str) -> str:
    """A row's text, empty where it is blank. Raises UserError where it has none, or none that can be tokenised."""
    if field not in row:
        raise missing_field(row, field, where)
    value = row[field]
    if isinstance(value, str) and not value.strip():
        return ""
    return check_text(value, f"field {field!r}", where)


def _read_text(file: InputFile, text_field: str) -> Iterator[Record]:
    with opened(file) as (stream, _):
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise not_utf8(f"{file.path}:{line}", content[error.start], column) from error
    yield Record({text_field: text}, str(file.path), file.size)


def _read_json_lines(file: InputFile, text_field: str) -> Iterator[Record]:
    with opened(file) as (stream, position):
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{file.path}:{number}"
                yield Record(parse_object(decode(line, where).rstrip("\r\n"), where, text_field), where, position())


def _read_parquet(file: InputFile, text_field: str) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(str(file.path)) as parquet:
            columns = (
                [text_field] if text_field in parquet.schema_arrow.names else None
            )  # whoever asks names what lacks
            total, number = parquet.metadata.num_rows, 0
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{file.path}: row {number}", file.size * number // total)
    except (ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file.path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror or error}") from error


READERS = {Format.text: _read_text, Format.json_lines: _read_json_lines, Format.parquet: _read_parquet}
