"""Tokenized text is kept, whole or not at all, and found again by what it was made of."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.build import build
from qwen_cl.data.corpus.cache import cache_directory, read_entry
from qwen_cl.data.corpus.prepare import BuildRequest, make_build_request
from tests.support.building import MODEL, built, leftovers, refusal, tokenizer
from tests.support.corpora import TEXTS, json_lines, source, text_files


def test_the_entry_follows_content_field_and_tokenizer_and_not_the_name(tmp_path: Path) -> None:
    def entry(path: Path, eos: str = "<|endoftext|>", field: str = "text") -> str:
        other = AutoTokenizer.from_pretrained(str(MODEL), eos_token=eos)
        # What a caller did with it in passing is no part of it.
        other("a", truncation=True, max_length=3, padding="max_length")
        return make_build_request(source(path, text_field=field), other, workers=1, cache=str(tmp_path / "cache")).entry

    first, moved = tmp_path / "a.jsonl", tmp_path / "below" / "b.jsonl"
    moved.parent.mkdir()
    for path in (first, moved):
        path.write_bytes(json_lines(TEXTS))
    same = entry(first)
    assert entry(moved) == same
    assert entry(first, field="body") != same
    assert entry(first, eos="<|im_end|>") != same
    content = first.read_bytes()
    first.write_bytes(content[:-3] + b" " + content[-3:])
    assert entry(first) != same
    (tmp_path / "a.txt").write_bytes(content)
    assert entry(tmp_path / "a.txt") != same
    # The same bytes, parted elsewhere.
    for name, parts in (("x", (3, 10)), ("y", (4, 10))):
        (tmp_path / name).mkdir()
        bounds = [0, *parts, len(TEXTS)]
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            (tmp_path / name / f"{number}.txt").write_text("".join(TEXTS[start:stop]), encoding="utf-8")
    assert entry(tmp_path / "x") != entry(tmp_path / "y")


def test_the_cache_is_where_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QWEN_CL_CACHE", raising=False)
    assert cache_directory(None) == tmp_path / ".cache/qwen_cl/corpora"
    monkeypatch.setenv("QWEN_CL_CACHE", str(tmp_path / "other"))
    assert cache_directory(None) == tmp_path / "other/corpora"
    assert cache_directory("~/mine") == tmp_path / "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^data\.cache \(.*/file\) is not a directory$"):
        cache_directory(str(tmp_path / "file"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> BuildRequest:
    """Build a corpus in a cache."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "a.jsonl").write_bytes(json_lines(TEXTS))
    request = make_build_request(source(directory / "a.jsonl"), tokenizer(), workers=1, cache=str(directory / "cache"))
    build(request)
    return request


def contents(entry: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in entry.iterdir()}


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "short", "missing"])
def test_an_entry_that_is_not_whole_is_built_again(damage: str, whole: BuildRequest) -> None:
    entry = Path(whole.entry)
    before = contents(entry)
    if damage == "no manifest":
        (entry / "manifest.json").unlink()
    elif damage == "half a manifest":
        (entry / "manifest.json").write_bytes(before["manifest.json"][:-40])
    elif damage == "short":
        (entry / "corpus.bin").write_bytes(before["corpus.bin"][:-2])
    else:
        (entry / "text_bytes.npy").unlink()
    assert read_entry(entry, None) is None
    build(whole)
    assert contents(entry) == before
    assert read_entry(entry, None) is not None


def test_a_tokenizer_without_its_rules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}', encoding="utf-8")
    (tmp_path / "merges.txt").touch()
    slow = Qwen2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    with pytest.raises(UserError, match=r"its tokenizer has no tokenizer\.json, which raw text is read with$"):
        make_build_request(source(tmp_path / "a.jsonl"), slow, workers=1, cache=str(tmp_path / "cache"))


def test_a_text_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([" ", ""]))
    message = f"data.path ({tmp_path}/a.jsonl) has no text to train on; name another source"
    assert refusal(tmp_path / "a.jsonl", tmp_path / "cache") == message


def test_a_broken_line_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["text"] * 3000) + b"{")
    assert refusal(tmp_path / "a.jsonl", tmp_path / "cache").startswith(f"{tmp_path}/a.jsonl:3001: not JSON (")


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    directory = text_files(tmp_path / "texts", TEXTS)
    request = make_build_request(source(directory), tokenizer(), workers=1, cache=str(tmp_path / "cache"))
    (directory / "part" / "000a.txt").write_text("one more", encoding="utf-8")
    with pytest.raises(UserError, match=r"^data\.path \(.*/texts\) changed while it was read; run the command again"):
        build(request)
    assert leftovers(tmp_path / "cache") == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["text " * 1000] * 50))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))  # the kernel refuses to write more to one file
    try:
        message = refusal(tmp_path / "a.jsonl", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"data.cache ({tmp_path}/cache) cannot be written to: File too large; free space there")
    assert built(tmp_path / "a.jsonl", tmp_path / "cache").counts.documents == 50


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "file").touch()
    request = make_build_request(
        source(tmp_path / "a.jsonl"), tokenizer(), workers=1, cache=str(tmp_path / "file" / "cache")
    )
    with pytest.raises(UserError, match=r"^data\.cache \(.*/file/cache\) cannot be written to: Not a directory; "):
        build(request)
