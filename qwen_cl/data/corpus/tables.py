"""Rows of CSV and TSV files, as RFC 4180 and spreadsheets write them. No torch."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.files import Format, InputFile, open_text_input
from qwen_cl.data.corpus.record import Record
from qwen_cl.data.jsonl import decode

SEPARATORS = {Format.csv: ",", Format.tsv: "\t"}
NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def read_table(file: InputFile, text_field: str | None) -> Iterator[Record]:
    """Yield the rows of a table with a header. An empty cell is null, but an empty text in ``text_field``.

    Raises:
        UserError: the header is missing, a row has another number of cells, or a quote is not closed.
    """
    separator = SEPARATORS[file.format]
    csv.field_size_limit(sys.maxsize)  # a cell may hold a book
    with open_text_input(file) as (stream, position):
        rows = _rows(file, _lines(stream, file), separator)
        header, names = next(rows, (0, []))
        if not header:
            raise UserError(f"{file.path} is empty; its first line must name the columns")
        _check_header(names, f"{file.path}:{header}", separator)
        number = 0
        for number, cells in rows:
            where = f"{file.path}:{number}"
            if len(cells) != len(names):
                raise UserError(
                    f"{where}: {_count(len(cells), 'cell')} where the first line names "
                    f"{_count(len(names), 'column')} ({', '.join(names)}); put what holds {NAMES[separator]}, quotes "
                    'or line ends in quotes ("…", and "" for one inside)'
                )
            found = {name: cell if cell or name == text_field else None for name, cell in zip(names, cells)}
            yield Record(found, where, position())
        if not number:
            raise UserError(f"{file.path} is empty: it has a line of column names and no row")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _lines(stream: Iterable[bytes], file: InputFile) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        yield decode(line, f"{file.path}:{number}", mark=number == 1)


def _rows(file: InputFile, lines: Iterator[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows with the number of their first line, without blank lines."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            where = f"{file.path}:{first}"
            if "unexpected end of data" in str(error):
                raise UserError(f"{where}: a quote is opened and not closed before the file ends; close it") from error
            if "new-line character" in str(error):
                raise UserError(f"{where}: its lines end with a lone \\r, as on old Macs; write \\n") from error
            raise UserError(
                f"{where}: {str(error).split(' - ')[0]}; a cell in quotes ends with its quote, and one inside is "
                "written twice"
            ) from error
        if cells is None:
            return
        if any(cell.strip() for cell in cells) or len(cells) > 1:
            yield first, cells


def _check_header(names: list[str], where: str, separator: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        what = f"{twice[0]!r} twice" if twice[0] else "several columns without a name"
        raise UserError(f"{where}: the first line names {what}; every column needs a name of its own")
    for other, called in NAMES.items():
        if len(names) == 1 and other != separator and other in names[0]:
            raise UserError(
                f"{where}: the one column {names[0]!r} looks like several between {called}; columns of "
                f"{'.csv' if separator == ',' else '.tsv'} files are between {NAMES[separator]}"
                + ("; let the name of a file with tabs end with .tsv" if other == "\t" else "")
            )
