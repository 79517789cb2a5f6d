"""Lines and JSON objects of text files, checked with FILE:LINE in every error. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError


def numbered_lines(path: Path, key: str, content: str = "one a line") -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, each with ``path:number``. Messages name the config ``key`` of the file and
    the ``content`` that it must hold.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has only blank lines.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; set {key}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    found = False
    with stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                found = True
                where = f"{path}:{number}"
                yield decode(line, where).rstrip("\r\n"), where
    if not found:
        raise UserError(f"{path} is empty; it must hold {content}")


def decode(line: bytes, where: str, *, mark: bool = True) -> str:
    """Decode a line of UTF-8; ``mark`` drops a byte order mark at its start. Raises UserError."""
    try:
        return line.decode("utf-8-sig" if mark else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(where, line, error.start, error.start + 1) from error


def decode_text(content: bytes, path: Path) -> str:
    """Decode the content of a file. Raises UserError with the line that is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        start = content.rfind(b"\n", 0, error.start)
        raise not_utf8(f"{path}:{line}", content, error.start, error.start - start) from error


def not_utf8(where: str, content: bytes, place: int, column: int) -> UserError:
    """Return the error of an invalid byte, at index ``place`` of ``content`` and at ``column`` of its line."""
    encoding = _guess_encoding(content[max(0, place - 200) : place + 200].split(b"\n"))
    looks = f" (it looks like {encoding})" if encoding else ""
    return UserError(
        f"{where}: byte 0x{content[place]:02x} at column {column} is not UTF-8{looks}; convert the file, "
        f"for example with: iconv -f {encoding or 'SHIFT_JIS'} -t UTF-8"
    )


def _guess_encoding(lines: list[bytes]) -> str | None:
    """Return the Japanese legacy encoding that decodes a line completely, with kana in it; None if none does."""
    for encoding in ("CP932", "EUC-JP"):
        for line in lines:
            try:
                text = line.decode(encoding.lower())
            except UnicodeDecodeError:
                continue
            if any("\u3041" <= character <= "\u30fe" for character in text):
                return encoding
    return None


class _RefusedValue(ValueError):
    """An error for JSON that the decoder accepts but that is ambiguous or not standard."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise _RefusedValue(f"field {twice!r} appears twice; remove one")
    return found


def _constant(name: str) -> Any:
    raise _RefusedValue(f"{name} is not valid JSON; write a number, or null")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def json_fault(error: ValueError | RecursionError) -> str:
    """Return the reason why :data:`DECODER` refused a JSON text, without its location."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "JSON nested too deep"
    return str(error) if isinstance(error, _RefusedValue) else "a number has too many digits"


def kind_of(value: Any) -> str:
    """Return the JSON name of the value's type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names.get(type(value), "not text")


def parse_object(line: str, where: str, fields: str) -> dict[str, Any]:
    """Parse a line that must be a JSON object; messages say ``fields`` for what it must hold. Raises UserError."""
    try:
        value = DECODER.decode(line)
    except _RefusedValue as error:
        raise UserError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {json_fault(error)}; every line is one object") from error
    return require_object(value, where, fields)


def require_object(value: Any, where: str, fields: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {kind_of(value)}, it must be an object with {fields}")
    return value
