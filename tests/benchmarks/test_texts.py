"""Debian's documentation as training text: what of a page is prose, and how it is cut."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.forgetting import japanese_files
from benchmarks.texts.__main__ import write
from benchmarks.texts.formats import HEADING, pages
from benchmarks.texts.packages import Source, fetch, members, sources
from benchmarks.texts.prose import Documents, clean, is_held_out, is_prose
from qwen_cl.config.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = "The quick program number {} reads its input from the file and it writes the result to the screen. "


def paragraph(number: int) -> str:
    """About 200 characters that no other number shares."""
    word = "".join(chr(ord("a") + int(digit)) for digit in f"{number:04d}")
    return (SENTENCE.format(word) * 2).strip()


def package(path: Path, files: dict[str, bytes]) -> Source:
    """A .deb as dpkg-deb makes it, an ar archive of three members, and the row of the table that names it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    blob = b"!<arch>\n"
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": content.getvalue(), "data.tar.xz": content.getvalue()}
    for name, data in parts.items():
        blob += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    path.write_bytes(blob)
    return Source("english", "html", f"pool/main/t/{path.name}", hashlib.sha256(blob).hexdigest(), "MIT", "*.html")


def test_a_page_without_its_code_tables_and_menus() -> None:
    page = (
        b"<html><head><title>No</title></head><body><nav>Home</nav><h2>Use<a class='headerlink'>\xc2\xb6</a></h2>"
        b"<p>First\n line.</p><pre>code</pre><table><tr><td>cell</td></tr></table><ul><li>One</li><li>Two</li></ul>"
        b"<div class='navfooter x'>Next</div><p>Last <b>one</b>.</p></body></html>"
    )
    assert list(pages("html", [("a.html", page)], "english")) == [
        [f"{HEADING}Use", "First line.", "One", "Two", "Last one."]
    ]


def test_a_dictionary_and_a_story() -> None:
    entries = b"actor\n\n   <theory> A {model}\n   of computing.\n\n   (1999-11-23)\n\nActs\n\n   More.\n"
    assert list(pages("dictionary", [("a.dz", gzip.compress(entries, mtime=0))], "english")) == [
        ["A model of computing.", "More."]
    ]
    scenario = b'[a]\nname= _ "One"\n[/a]\nmessage=_"He said ""no"".\n<b>Then</b> he left."\nid=x'
    assert list(pages("story", [("a.cfg", scenario)], "english")) == [["One", 'He said "no".', "Then he left."]]


def test_man_pages_without_mandoc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="mandoc is not on PATH; man pages are read with it: apt-get install mandoc"):
        list(pages("manual", [("a.1.gz", gzip.compress(b".TH A 1", mtime=0))], "english"))


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("english", "The kernel gives the blocks of the disk back to whoever wants them.", True),
        ("english", "Der Kern gibt die Blöcke der Platte an den nächsten zurück, der sie haben will.", False),
        ("english", "int main(int argc, char **argv) { return run(argc, argv) == 0; } // the end of it.", False),
        ("english", "Home Index Search Next Previous Contents Copyright", False),
        ("japanese", "この関数は、成功した場合に 0 を返します。", True),
        ("japanese", "Please see the manual of the program. 詳細です。", False),
        ("japanese", "目次 索引 検索", False),
    ],
)
def test_what_is_prose(language: str, text: str, expected: bool) -> None:
    assert is_prose(text, language) is expected


def test_clean() -> None:
    assert clean("1.2. “Use”\u00a0it — now¶ [3]", "english") == '"Use" it - now'
    assert (
        clean("このコマンドは\n   ファイル名を ls で\n表示する。", "japanese")
        == "このコマンドはファイル名を ls で表示する。"
    )


def test_documents_are_cut_at_headings_and_say_no_paragraph_twice() -> None:
    documents = Documents("english")
    page = [f"{HEADING}One", *map(paragraph, range(20)), f"{HEADING}Two", *map(paragraph, range(15, 40))]
    first, second = documents.of(page)
    assert first.split("\n\n") == ["One", *map(paragraph, range(20))]
    assert second.split("\n\n") == ["Two", *map(paragraph, range(20, 40))]
    assert list(documents.of(page)) == []
    assert list(documents.of([paragraph(50)])) == []  # shorter than 500 characters
    long = list(documents.of(list(map(paragraph, range(100, 300)))))
    assert "\n\n".join(long).split("\n\n") == list(map(paragraph, range(100, 300)))
    assert all(500 <= len(document) <= 20000 for document in long)


def test_one_document_in_fifty_is_held_out() -> None:
    held_out = sum(is_held_out(f"document {number}") for number in range(10_000))
    assert 150 < held_out < 250


def test_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    body = "".join(f"<h2>Part</h2><p>{paragraph(n)}</p><p>{paragraph(n + 500)}</p>" for n in range(400))
    source = package(tmp_path / "made_1.0_all.deb", {"b.html": body.encode(), "a.txt": b"no"})
    assert members(tmp_path / "made_1.0_all.deb", "*.html") == [("./b.html", body.encode())]
    for name in ("one", "two"):
        write(tmp_path / name, tmp_path, [source])
    written = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    rows = (
        written["english.train.jsonl"].decode().splitlines() + written["english.validation.jsonl"].decode().splitlines()
    )
    assert {json.loads(row)["package"] for row in rows} == {"made"}
    said = [text for row in rows for text in json.loads(row)["text"].split("\n\n") if text != "Part"]
    assert sorted(said) == sorted(paragraph(n + more) for n in range(400) for more in (0, 500))
    assert b"| english | made | 1.0 | MIT |" in written["SOURCES.md"]


def test_one_package_is_trained_on_and_a_fifth_of_it_held_out(tmp_path: Path) -> None:
    train = [{"text": f"{name} {number}", "package": name} for number in range(29) for name in ("a", "b")]
    validation = [{"text": "held out", "package": name} for name in ("b", "c")]
    for part, content in (("train", train), ("validation", validation)):
        lines = [json.dumps(row) + "\n" for row in content]
        (tmp_path / f"japanese.{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "chosen").mkdir()
    chosen = japanese_files(tmp_path, "b", tmp_path / "chosen")
    read = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in chosen]
    own = [row for row in [*train, *validation] if row["package"] == "b"]
    own.sort(key=lambda row: hashlib.sha256(row["text"].encode()).hexdigest())
    assert read == [own[6:], own[:6]]
    whole = japanese_files(tmp_path, None, tmp_path / "chosen")
    assert whole == [tmp_path / f"japanese.{part}.jsonl" for part in ("train", "validation")]
    with pytest.raises(SystemExit, match=r"--package c has 1 documents, at least two are needed; packages: a, b, c$"):
        japanese_files(tmp_path, "c", tmp_path / "chosen")


def test_a_package_that_is_not_the_pinned_one(tmp_path: Path) -> None:
    source = package(tmp_path / "made_1.0_all.deb", {})
    (tmp_path / "made_1.0_all.deb").write_bytes(b"other")
    with pytest.raises(
        UserError, match=rf"made_1.0_all.deb: sha256 is \w{{64}}, packages.tsv says {source.sha256}; del"
    ):
        fetch(source, tmp_path)


def test_the_table_of_packages() -> None:
    rows = sources()
    assert {row.language for row in rows} == {"english", "japanese"}
    assert {row.format for row in rows} == {"html", "page", "manual", "dictionary", "story"}
    assert all(row.path.startswith("pool/main/") and len(row.sha256) == 64 and row.license for row in rows)
    assert len({(row.language, row.path) for row in rows}) == len(rows)


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    first = sources()[0].path.rpartition("/")[2]
    (tmp_path / first).write_bytes(b"other")
    command = [sys.executable, "-m", "benchmarks.texts", str(tmp_path / "out"), "--packages", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{tmp_path / first}: sha256 is ")
    assert done.stderr.count("\n") == 1
