"""Input files: resolving paths, detecting formats, opening and hashing. No torch."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from qwen_cl.config.errors import UserError
from qwen_cl.files.hashing import hash_file


class Format(str, Enum):
    """A format of input files."""

    text = "text"
    json_lines = "json_lines"
    """JSON Lines or one array, detected from the content."""
    csv = "csv"
    tsv = "tsv"
    parquet = "parquet"


FORMATS = {
    ".txt": Format.text,
    ".jsonl": Format.json_lines,
    ".ndjson": Format.json_lines,
    ".json": Format.json_lines,
    ".csv": Format.csv,
    ".tsv": Format.tsv,
    ".parquet": Format.parquet,
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KNOWN = ".txt, .jsonl, .ndjson, .json, .csv or .tsv, each also .gz or .zst; .parquet"
MAGIC = {
    b"\x1f\x8b": "is compressed with gzip, which its name does not say; let it end with .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd, which its name does not say; let it end with .zst",
    b"PAR1": "is a Parquet file, which its name does not say; let it end with .parquet",
    b"PK\x03\x04": "is a zip archive (as .xlsx files are) and not text; unpack it, or save the table as CSV in UTF-8",
    b"\xff\xfe": "is in UTF-16, it must be UTF-8; convert it with: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is in UTF-16, it must be UTF-8; convert it with: iconv -f UTF-16 -t UTF-8",
}
"""First bytes of files that are not plain text, with the message."""
SNIFFED = 1024
"""Bytes read to detect the type."""
PLACES = "hf://datasets/ORG/NAME, or the prefix of Megatron's PREFIX.bin and PREFIX.idx"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read, with its format and compression."""

    path: Path
    """Absolute path."""
    format: Format
    compression: str | None
    """pyarrow's name of the compression, or None."""
    size: int
    """Bytes on disk."""


def find_files(path: str, key: str, places: str = PLACES) -> list[InputFile]:
    """Return the files of a path, directory or glob, sorted by name. Messages name the config ``key``, and ``places``
    for what else it accepts.

    Raises:
        UserError: there are no files, or one of an unknown format.
    """
    expanded = os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - Path's raises on an unknown user
    if os.path.isfile(expanded):  # noqa: PTH113
        names = [expanded]
    elif os.path.isdir(expanded):  # noqa: PTH112
        names = _below(expanded)
        if not names:
            raise UserError(f"{key} ({path}) is a directory without files; put {KNOWN} there")
    elif glob.has_magic(expanded):
        names = [name for name in glob.glob(expanded, recursive=True) if os.path.isfile(name)]  # noqa: PTH113, PTH207
        if not names:
            raise UserError(f"{key} ({path}) matches no file; ** stands for any number of directories")
    else:
        raise UserError(f"{key} ({path}) does not exist; name a file, a glob, a directory, {places}")
    return [_input_file(Path(name), key, in_directory=names != [expanded]) for name in sorted(names)]


def _below(directory: str) -> list[str]:
    """List the files below a directory, without hidden files and those starting with _, which are no data."""
    names = glob.glob(os.path.join(glob.escape(directory), "**"), recursive=True)  # noqa: PTH118, PTH207
    relative = {name: Path(name).relative_to(directory) for name in names if os.path.isfile(name)}  # noqa: PTH113
    return [name for name, path in relative.items() if not any(part.startswith("_") for part in path.parts)]


def format_of(path: Path) -> tuple[Format | None, str | None]:
    """Return the format of a file by its name, None if unknown, and its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    format = FORMATS.get(suffixes[-1]) if suffixes else None
    return (None if format is Format.parquet and compression is not None else format), compression


def _input_file(path: Path, key: str, *, in_directory: bool) -> InputFile:
    format, compression = format_of(path)
    if format is None:
        others = "; a glob such as DIRECTORY/**/*.jsonl leaves others out" if in_directory else ""
        if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
            others = "; save the table as CSV in UTF-8" + others
        raise UserError(f"{key}: {path} is of an unknown format; known are {KNOWN}{others}")
    return InputFile(path, format, compression, path.stat().st_size)


def hash_files(paths: list[Path]) -> str:
    """Return the sha256 over the files' sizes and bytes, in this order, independent of their names."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(f"{path.stat().st_size}\n".encode())
            hash_file(path, digest)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def stamps(files: list[InputFile]) -> list[list[str | int]]:
    """Return path, size and modification time of files, to detect changes; plain values for JSON."""
    status = [(file.path, file.path.stat()) for file in files]
    return [[str(path), now.st_size, now.st_mtime_ns] for path, now in status]


@contextmanager
def open_input(file: InputFile) -> Iterator[tuple[BufferedReader, Callable[[], int]]]:
    """Open a file for its decompressed bytes, with a function that returns the position on disk.

    Raises:
        UserError: the file cannot be read, or its compressed data is damaged or truncated.
    """
    import pyarrow

    try:
        if file.compression is None:
            with file.path.open("rb") as stream:
                yield stream, stream.tell
        else:
            raw = pyarrow.OSFile(str(file.path))
            decompressed = cast(Any, pyarrow.CompressedInputStream(raw, file.compression))
            with BufferedReader(decompressed, 2**18) as stream:
                yield stream, raw.tell
    except OSError as error:
        if error.errno is None:  # pyarrow's error about the content
            raise UserError(f"{file.path}: damaged {file.compression}: {error}; fetch or compress it again") from error
        raise UserError(f"{file.path} cannot be read: {os.strerror(error.errno)}") from error


@contextmanager
def open_text_input(file: InputFile) -> Iterator[tuple[BufferedReader, Callable[[], int]]]:
    """Open a file with :func:`open_input`, and refuse what is not text.

    Raises:
        UserError: the file cannot be read, or its first bytes are those of another format.
    """
    with open_input(file) as (stream, position):
        start = stream.peek(SNIFFED)[:SNIFFED]
        for magic, what in MAGIC.items():
            if start.startswith(magic):
                raise UserError(f"{file.path} {what}")
        if b"\0" in start:
            raise UserError(
                f"{file.path} has zero bytes, as UTF-16 and binary files have; it must be text in UTF-8 (to convert "
                "it: iconv -f UTF-16 -t UTF-8)"
            )
        yield stream, position
