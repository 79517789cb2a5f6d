"""Lines of text files, each checked where it stands. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError


def numbered_lines(path: Path, key: str, content: str = "one a line") -> Iterator[tuple[str, str]]:
    """Lines that are not blank, with ``path:number``. ``key`` is what to set to another file, ``content`` what a file
    must hold.

    Raises:
        UserError: it cannot be read, is not UTF-8, or has no such line.
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


def decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8; convert the file, "
            "for example with: iconv -f SHIFT_JIS -t UTF-8"
        ) from error


def parse_object(line: str, where: str, fields: str) -> dict[str, Any]:
    """``fields`` names, for the message, what an object must hold."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); every line is one object") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deep; every line is one object of texts") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {type(value).__name__} where an object with {fields} must be")
    return value
