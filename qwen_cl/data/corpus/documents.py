"""The documents of raw text, in order, each checked where it stands. No torch."""

from __future__ import annotations

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
class Document:
    text: str
    """Empty where the source has blanks alone."""
    where: str
    """For messages: ``FILE``, ``FILE:LINE`` or ``FILE: row N``."""
    progress: int
    """Bytes of all files read up to its end, roughly; of a dataset on the Hub, rows."""


def read_files(files: Iterable[InputFile], text_field: str) -> Iterator[Document]:
    """A text file is one document, a line of JSON Lines or a row of Parquet another.

    Raises:
        UserError: names file and line of the first that is not as it must be.
    """
    before = 0
    for file in files:
        for document in READERS[file.format](file, text_field):
            yield Document(document.text, document.where, before + document.progress)
        before += file.size


def take_text(row: Mapping[str, Any], field: str, where: str) -> str:
    """A row's text, empty where it is blank. Raises UserError where it has none, or none that can be tokenised."""
    if field not in row:
        raise missing_field(row, field, where)
    value = row[field]
    if isinstance(value, str) and not value.strip():
        return ""
    return check_text(value, f"field {field!r}", where)


def _read_text(file: InputFile, text_field: str) -> Iterator[Document]:
    with opened(file) as (stream, _):
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise not_utf8(f"{file.path}:{line}", content[error.start], column) from error
    yield Document(text if text.strip() else "", str(file.path), file.size)


def _read_json_lines(file: InputFile, text_field: str) -> Iterator[Document]:
    with opened(file) as (stream, position):
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{file.path}:{number}"
                text = take_text(parse_object(decode(line, where).rstrip("\r\n"), where, text_field), text_field, where)
                yield Document(text, where, position())


def _read_parquet(file: InputFile, text_field: str) -> Iterator[Document]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(str(file.path)) as parquet:
            if text_field not in parquet.schema_arrow.names:
                raise missing_field(parquet.schema_arrow.names, text_field, str(file.path))
            total, number = parquet.metadata.num_rows, 0
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=[text_field]):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{file.path}: row {number}"
                    yield Document(take_text(row, text_field, where), where, file.size * number // total)
    except (ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file.path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror or error}") from error


READERS = {Format.text: _read_text, Format.json_lines: _read_json_lines, Format.parquet: _read_parquet}
