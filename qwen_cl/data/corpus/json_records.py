"""Objects of JSON files: JSON Lines, one array, or concatenated objects in any layout. No torch."""

from __future__ import annotations

import itertools
import json
import re
from codecs import BOM_UTF8
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.files import InputFile, open_text_input
from qwen_cl.data.corpus.record import Record
from qwen_cl.data.jsonl import DECODER, decode, decode_text, json_fault, parse_object, require_object

BLANKS = re.compile(r"[ \t\r\n]*")
FOLLOWED = "Something follows the array"
WRAPPERS = ("data", "rows", "train", "validation", "test", "examples", "instances", "records", "items", "samples")
"""Names of the single field of an object that wraps the rows."""


def read_json(file: InputFile, text_field: str | None) -> Iterator[Record]:
    """Yield the objects of a file. JSON Lines are streamed; other layouts are held in memory.

    Raises:
        UserError: names the line of the syntax error, or the row that is not an object.
    """
    with open_text_input(file) as (stream, position):
        lines = enumerate(stream, start=1)
        head = _first_lines(lines)
        if _is_one_text(file.path, [line for _, line in head if not _is_blank(line)]):
            content = b"".join(line for _, line in head) + stream.read()
            for line_number, value in _rows(decode_text(content, file.path), file.path):
                where = f"{file.path}:{line_number}"
                yield Record(require_object(value, where, _wanted(text_field)), where, file.size)
            return
        for number, line in itertools.chain(head, lines):
            if not _is_blank(line):
                where = f"{file.path}:{number}"
                yield Record(
                    parse_object(decode(line, where).rstrip("\r\n"), where, _wanted(text_field)), where, position()
                )


def _wanted(text_field: str | None) -> str:
    return "fields" if text_field is None else f"field {text_field!r}"


def _first_lines(lines: Iterable[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Return the lines up to the second that is not blank."""
    head, found = [], 0
    for number, line in lines:
        head.append((number, line))
        found += not _is_blank(line)
        if found == 2:
            break
    return head


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(BOM_UTF8).strip()


def _is_one_text(path: Path, head: list[bytes]) -> bool:
    if not head:
        return False
    first = decode(head[0], f"{path}:1").strip()
    if len(head) == 1 or not first.startswith("{"):
        return first.startswith(("[", "{"))
    if first.endswith("["):  # {"data": [
        return True
    return not _is_object(first) and not _is_object(head[1].decode(errors="replace"))


def _is_object(line: str) -> bool:
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), dict)
    return False


def _rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows, each with the number of its first line."""
    line, counted = 1, 0
    try:
        for start, value in _values(text):
            line, counted = line + text.count("\n", counted, start), start
            yield line, value
    except json.JSONDecodeError as error:
        end = len(text.rstrip())
        place = min(error.pos, end)
        where = f"{path}:{line + text.count(chr(10), counted, place)}"
        unclosed = text[_skip(text, 0)] == "[" and text[end - 1] != "]" and error.msg != FOLLOWED
        more = "; the array ends without its ]" if unclosed else ""
        column = place - text.rfind("\n", 0, place)
        raise UserError(f"{where}: not JSON ({error.msg.removesuffix(' at')} at column {column}){more}") from error


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows, each with its start. Raises JSONDecodeError."""
    at = _skip(text, 0)
    if text[at] == "[":
        at = yield from _items(text, at)
        if at < len(text):
            raise json.JSONDecodeError(FOLLOWED, text, at)
        return
    first = True
    while at < len(text):
        start = at
        value, at = _decode(text, at)
        at = _skip(text, at)
        if first and at == len(text) and _wraps(value):
            yield from _items(text, text.index("[", start))
            return
        yield start, value
        first = False


def _items(text: str, at: int) -> Generator[tuple[int, Any], None, int]:
    """Yield the items of the array that starts at ``at``; return the position after it."""
    at = _skip(text, at + 1)
    if text[at : at + 1] == "]":
        return _skip(text, at + 1)
    while True:
        start = at
        value, at = _decode(text, at)
        yield start, value
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            return _skip(text, at + 1)
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _skip(text, at + 1)


def _wraps(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) == 1
        and all(name in WRAPPERS and isinstance(rows, list) for name, rows in value.items())
    )


def _decode(text: str, at: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(json_fault(error), text, at) from error


def _skip(text: str, at: int) -> int:
    match = BLANKS.match(text, at)
    assert match is not None
    return match.end()
