"""The same documents in each form that a corpus may have."""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
from pyarrow import parquet

from qwen_cl.data.corpus.documents import TextSource

TEXTS = [
    "A first document.\nIt has two lines.\n",
    "日本語の文書。二番目です。",
    "Emoji 🎌 and <|endoftext|> and <|im_start|>user, spelt out.",
    "short",
    "é as one character, e\u0301 as two",
] + [f"Document {number}: " + "word " * (number * 7 % 40) + "終わり。" for number in range(30)]


def source(path: Path | str, *, text_field: str = "text") -> TextSource:
    return TextSource(key="data.path", path=str(path), text_field=text_field, split="train", subset=None)


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


def write_parquet(path: Path, texts: list[str]) -> None:
    table = pyarrow.table({"number": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=7)


def text_files(directory: Path, texts: list[str]) -> Path:
    (directory / "part").mkdir(parents=True)
    for number, text in enumerate(texts):
        place, content = directory / "part" / f"{number:03}.txt", text.encode()
        if number % 3 == 0:
            place.with_suffix(".txt.gz").write_bytes(gzip.compress(content, mtime=0))
        elif number % 3 == 1:
            place.with_suffix(".txt.zst").write_bytes(zstd(content))
        else:
            place.write_bytes(content)
    (directory / "_SUCCESS").touch()
    (directory / ".hidden.csv").touch()
    return directory


def _written(name: str, content: Callable[[list[str]], bytes]) -> Callable[[Path, list[str]], Path]:
    def write(directory: Path, texts: list[str]) -> Path:
        (directory / name).write_bytes(content(texts))
        return directory / name

    return write


def _parquet(directory: Path, texts: list[str]) -> Path:
    write_parquet(directory / "a.parquet", texts)
    return directory / "a.parquet"


def _directory(directory: Path, texts: list[str]) -> Path:
    return text_files(directory / "texts", texts)


def _globbed(directory: Path, texts: list[str]) -> Path:
    """Write three files in two formats, and others with different content that the glob does not match."""
    (directory / "below").mkdir()
    (directory / "a.jsonl").write_bytes(json_lines(texts[:10]))
    (directory / "below" / "b.jsonl").write_bytes(json_lines(texts[10:20]))
    (directory / "c.jsonl").write_bytes(json_lines(texts[20:]))
    (directory / "other.csv").write_bytes(b"text\nno\n")
    return directory / "**" / "*.jsonl"


FORMS: dict[str, Callable[[Path, list[str]], Path]] = {
    "jsonl": _written("a.jsonl", json_lines),
    "jsonl.gz": _written("a.jsonl.gz", lambda texts: gzip.compress(json_lines(texts), mtime=0)),
    # The output of `cat a.gz b.gz`.
    "members.gz": _written(
        "a.json.gz",
        lambda texts: gzip.compress(json_lines(texts[:4]), mtime=0) + gzip.compress(json_lines(texts[4:]), mtime=0),
    ),
    "jsonl.zst": _written("a.ndjson.zst", lambda texts: zstd(json_lines(texts[:9])) + zstd(json_lines(texts[9:]))),
    "parquet": _parquet,
    "directory": _directory,
    "glob": _globbed,
}


def die_while_answering(texts: list[str]) -> None:
    """Kill a ProcessPoolExecutor's worker when half of its result is in the pipe."""
    pipe = sys._getframe(1).f_locals["result_queue"]._writer
    os.write(pipe.fileno(), struct.pack("!i", 1_000_000) + b"half")
    os.kill(os.getpid(), signal.SIGKILL)
