"""The same rows from every kind of file, each with its place; what is no such file is refused by its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.conversations import pair
from qwen_cl.data.eval_sets import read_sets
from qwen_cl.data.rows import Text, content_hash, read_rows, row_location
from tests.data.test_datamodule import files
from tests.support.corpora import zstd

PAIRS = [("one", "ichi"), ('two, "2"', "ni\nfutatsu"), ("三", "さん"), ("four", "[shi]"), ("five", "{}"), ("6", "0")]
ROWS: list[dict[str, Any]] = [{"prompt": prompt, "completion": completion, "id": 1} for prompt, completion in PAIRS]


def lines(rows: list[dict[str, Any]] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(separator: str, end: str = "\n") -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["prompt", "completion", "id"], delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue()


def indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


TEXT_FORMS: dict[str, str] = {
    "lines.jsonl": lines(),
    "crlf.jsonl": lines().replace("\n", "\r\n"),
    "array.json": indented(ROWS),
    "array_on_a_line.json": json.dumps(ROWS),
    "array_of_lines.json": "\n\n[\n" + ",\n".join(lines().splitlines()) + "\n]\n",
    "array_by_its_content.jsonl": indented(ROWS),
    "lines_by_their_content.json": lines(),
    "wrapped.json": indented({"data": ROWS}),
    "wrapped_on_a_line.json": json.dumps({"train": ROWS}),
    "wrapped_lines.json": '{"rows": [\n' + ",\n".join(lines().splitlines()) + "\n]}\n",
    "objects_laid_out.json": "".join(map(indented, ROWS)),
    "table.csv": table(","),
    "windows.csv": table(",", "\r\n"),
    "table.tsv": table("\t"),
}
"""By file name."""
FIRST_LINES = {"array.json": [2, 7, 12], "table.csv": [2, 3, 5], "objects_laid_out.json": [1, 6, 11]}
"""Of the first three rows, where they are known by looking at the file."""


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    return path


def rows_of(path: Path) -> list[Any]:
    """Return all rows, in their order in the file."""
    kept, held_out = read_rows(files(path, every=2))
    return [row for both in zip(held_out, kept, strict=True) for row in both]


@pytest.mark.parametrize("pack", [str.encode, lambda text: b"\xef\xbb\xbf" + text.encode()], ids=["", "bom"])
@pytest.mark.parametrize("name", TEXT_FORMS)
def test_every_form_of_text_gives_the_same_rows(name: str, pack: Callable[[str], bytes], tmp_path: Path) -> None:
    content = pack(TEXT_FORMS[name])
    packed = {"": content, ".gz": gzip.compress(content, mtime=0), ".zst": zstd(content)}
    for suffix, written in packed.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(written)
        assert rows_of(path) == [pair(*each) for each in PAIRS]


def test_parquet_gives_the_same_rows_and_their_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    assert rows_of(path) == [pair(*each) for each in PAIRS]
    places = [row_location(files(path, every=2), index, validation=False) for index in range(3)]
    assert places == [f"{path}: row {number}" for number in (2, 4, 6)]


@pytest.mark.parametrize("name", FIRST_LINES)
def test_a_row_is_where_it_starts(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(TEXT_FORMS[name], encoding="utf-8")
    source = files(path, every=2)
    found = [
        row_location(source, 0, validation=True),
        row_location(source, 0, validation=False),
        row_location(source, 1, validation=True),
    ]
    assert found == [f"{path}:{line}" for line in FIRST_LINES[name]]


def test_a_directory_and_a_glob_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("prompt,completion\nthird,c\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(indented([{"prompt": "first", "completion": "a"}]), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "second", "completion": "b"}\n', mtime=0))
    write_parquet(tmp_path / "c.parquet", [{"prompt": "fourth", "completion": "d"}])
    every = ["first", "second", "third", "fourth"]
    assert [row.messages[0].content for row in rows_of(tmp_path)] == every
    assert [row.messages[0].content for row in rows_of(tmp_path / "a.*")] == every[:2]
    source = files(tmp_path, every=2)
    assert row_location(source, 1, validation=False) == f"{tmp_path}/c.parquet: row 1"
    before = content_hash(source)
    (tmp_path / "b.csv").write_text("prompt,completion\nthird,C\n", encoding="utf-8")
    assert content_hash(source) != before


def test_sets_and_raw_text_are_read_from_tables_and_arrays_too(tmp_path: Path) -> None:
    (tmp_path / "old.tsv").write_text('text\tid\nA text.\t1\n"Two\nlines."\t2\n', encoding="utf-8")
    (tmp_path / "chat.json").write_text(indented(ROWS[:2]), encoding="utf-8")
    texts, chat = read_sets(
        {"old": str(tmp_path / "old.tsv"), "chat": str(tmp_path / "chat.json")}, "retention.eval_sets"
    )
    assert texts.rows == [Text("A text."), Text("Two\nlines.")]
    assert texts.places == [f"{tmp_path}/old.tsv:2", f"{tmp_path}/old.tsv:3"]
    assert chat.rows == [pair(*each) for each in PAIRS[:2]]
    kept, held_out = read_rows(files(tmp_path / "old.tsv", every=2, text=True))
    assert held_out + kept == texts.rows


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,completion\na,b\nc,d,e\n", ":3: 3 cells where the first line names 2 columns (prompt, comp"),
        ("a.csv", 'prompt,completion\n"a\n\n",b\nc\n', ":5: 1 cell where the first line names 2 columns"),
        ("a.csv", "prompt,completion,prompt\na,b,c\n", ":1: the first line names 'prompt' twice"),
        ("a.csv", "", " is empty; its first line must name the columns"),
        ("a.csv", "prompt,completion\n", " is empty: it has a line of column names and no row"),
        ("a.csv", "prompt;completion\na;b\n", ":1: the one column 'prompt;completion' looks like several between semi"),
        ("a.csv", "prompt\tcompletion\na\tb\n", ":1: the one column 'prompt\\tcompletion' looks like several between"),
        ("a.tsv", "prompt,completion\na,b\n", ":1: the one column 'prompt,completion' looks like several between com"),
        ("a.csv", 'prompt,completion\na,b\n"c,d\ne,f\n', ":3: a quote is opened and not closed before the file ends"),
        ("a.csv", 'prompt,completion\n"a"x,b\n', ":2: ',' expected after '\"'; a cell in quotes ends with its quote"),
        ("a.csv", "prompt,completion\ra,b\r", ":1: its lines end with a lone \\r, as on old Macs"),
        (
            "a.json",
            f"[\n{GOOD},\n{GOOD[:-4]}",
            ":3: not JSON (Expecting value at column 30); the array ends without",
        ),
        (
            "a.json",
            f"[\n{GOOD},\n{GOOD}\n",
            ":3: not JSON (Expecting ',' delimiter at column 35); the array ends without",
        ),
        ("a.json", f"[\n{GOOD}\n{GOOD}\n]", ":3: not JSON (Expecting ',' delimiter at column 1)"),
        ("a.json", f"[\n{GOOD},\n]", ":3: not JSON (Expecting value at column 1)"),
        ("a.json", f"[\n{GOOD}\n]\n{GOOD}", ":4: not JSON (Something follows the array at column 1)"),
        ("a.json", f"[\n{GOOD},\n3]", ":3: a number, it must be an object with fields"),
        ("a.json", f"[{GOOD},\nnull]", ":2: null, it must be an object with fields"),
        (
            "a.json",
            f'[\n{GOOD},\n{{"prompt": NaN}}]',
            ":3: not JSON (NaN is not valid JSON; write a number, or null",
        ),
        ("a.json", f"[\n{GOOD},\n" + "[" * 100_000, ":3: not JSON (JSON nested too deep at column 1)"),
        ("a.json", "[]", " is empty; it must hold rows"),
        ("a.json", "", " is empty; it must hold rows"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "a", "score": -Infinity}}\n', ":2: -Infinity is not valid JSON; write"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "a", "prompt": "b"}}\n', ":2: field 'prompt' appears twice; remove one"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": {"9" * 5000}}}\n', ":2: a number has too many digits"),
        (
            "a.jsonl",
            f'{{"prompt": "a\n{GOOD}\n',
            ":1: not JSON (Unterminated string starting at column 12); every line",
        ),
        (
            "a.csv",
            "prompt,completion\nこんにちは,b\n".encode("cp932"),
            ":2: byte 0x82 at column 1 is not UTF-8 (it looks",
        ),
        (
            "a.csv",
            "prompt,completion\nこんにちは,b\n".encode("euc-jp"),
            ":2: byte 0xa4 at column 1 is not UTF-8 (it look",
        ),
        ("a.json", indented([{"prompt": "é"}]).encode("latin-1"), ":3: byte 0xe9 at column 16 is not UTF-8; convert"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), " is in UTF-16, it must be UTF-8; convert it with: ic"),
        ("a.jsonl", GOOD.encode("utf-16-le"), " has zero bytes, as UTF-16 and binary files have"),
        ("a.jsonl", gzip.compress(GOOD.encode()), " is compressed with gzip, which its name does not say"),
        ("a.csv", zstd(GOOD.encode()), " is compressed with zstd, which its name does not say"),
        ("a.csv", b"PK\x03\x04", " is a zip archive (as .xlsx files are) and not text"),
        ("a.csv.gz", gzip.compress(table(",").encode())[:-9], ": damaged gzip: Truncated compressed stream; fetch or"),
        ("a.parquet", GOOD, " cannot be read as Parquet: Parquet magic bytes not found"),
        ("a.parquet", "", " cannot be read as Parquet: Parquet file size is 0 bytes"),
        ("a.xlsx", b"PK\x03\x04", " is of an unknown format; known are .txt, .jsonl"),
        ("a.txt", GOOD, " is raw text, for task=pretrain; task=finetune takes rows with fields"),
        ("rows", GOOD, " is of an unknown format; known are .txt, .jsonl"),
    ],
    ids=lambda value: value[:45] if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_named(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        read_rows(files(path))
    assert str(refused.value).removeprefix("data.path: ").startswith(f"{path}{message}")
    assert "\n" not in str(refused.value)


def test_the_encoding_of_a_japanese_file_is_guessed_in_the_command_that_converts_it(tmp_path: Path) -> None:
    for encoding in ("CP932", "EUC-JP"):
        (tmp_path / "a.csv").write_bytes("prompt,completion\nひらがな,カタカナ\n".encode(encoding))
        with pytest.raises(UserError, match=rf"\(it looks like {encoding}\); .* iconv -f {encoding} -t UTF-8$"):
            read_rows(files(tmp_path / "a.csv"))


def test_damage_within_parquet_and_columns_of_one_name_are_reported_in_a_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the first page's header
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_rows(files(path))
    assert str(refused.value).startswith(f"{path} cannot be read")
    assert "\n" not in str(refused.value)
    column = pyarrow.array(["a", "b"])
    parquet.write_table(pyarrow.Table.from_arrays([column] * 3, names=["prompt", "completion", "prompt"]), path)
    with pytest.raises(UserError, match=r"a\.parquet has two columns 'prompt'; every column needs a name of its own"):
        read_rows(files(path))


def test_a_table_may_say_that_every_row_has_its_full_weight(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,weight\n" + "".join(f"q{number},a{number},1\n" for number in range(3)))
    train, validation = read_rows(files(path))
    assert len(train) + len(validation) == 3
    path.write_text("prompt,completion,weight\nq,a,1\nq2,a2,0\nq3,a3,1\n")
    with pytest.raises(UserError, match=r"a\.csv:3: field 'weight' weights a whole row, which is not supported"):
        read_rows(files(path))
