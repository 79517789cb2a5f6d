"""Documents of text files: split at blank lines, at every line, or not at all. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwen_cl.config.data import DocumentSeparator
from qwen_cl.data.corpus.files import InputFile, open_text_input
from qwen_cl.data.corpus.record import Record
from qwen_cl.data.jsonl import decode, decode_text


def read_text(file: InputFile, text_field: str, separator: DocumentSeparator) -> Iterator[Record]:
    """Yield each document as a record with the single field ``text_field``. A file of only whitespace is one empty
    document.

    Raises:
        UserError: names the line that is not UTF-8.
    """
    if separator is DocumentSeparator.file:
        with open_text_input(file) as (stream, _):
            text = decode_text(stream.read(), file.path)
        yield Record({text_field: text}, str(file.path), file.size)
        return
    blank = True
    with open_text_input(file) as (stream, position):
        for text, line in _documents(_lines(stream, file), each_line=separator is DocumentSeparator.line):
            blank = False
            yield Record({text_field: text}, f"{file.path}:{line}", position())
    if blank:
        yield Record({text_field: ""}, str(file.path), file.size)


def _lines(stream: Iterable[bytes], file: InputFile) -> Iterator[str]:
    """Yield the lines without line ends, also those of Windows."""
    for number, line in enumerate(stream, start=1):
        yield decode(line, f"{file.path}:{number}", mark=number == 1).rstrip("\r\n")


def _documents(lines: Iterable[str], *, each_line: bool) -> Iterator[tuple[str, int]]:
    """Yield the documents with the number of their first line; whitespace-only lines belong to none."""
    document: list[str] = []
    first = 0
    for number, line in enumerate(lines, start=1):
        blank = not line.strip()
        if not blank:
            first = first if document else number
            document.append(line)
        if document and (blank or each_line):
            yield "\n".join(document), first
            document = []
    if document:
        yield "\n".join(document), first
