"""Text files are cut into documents, and of a text that is one document the end validates."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_cl.config.data import DocumentSeparator, TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.saved import load_config, save_config
from qwen_cl.data.corpus.documents import read_files
from qwen_cl.data.corpus.examples import CorpusExamples
from qwen_cl.data.corpus.files import find_files
from qwen_cl.data.corpus.prepare import locate_document, make_build_request
from qwen_cl.data.corpus.text_dataset import TextTarget, prepare_target, summarize_validation
from qwen_cl.data.raw_text import document_delimiters
from qwen_cl.data.set_files import read_set_rows
from qwen_cl.planning.plan import make_plan
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.resume import resume
from qwen_cl.runs.status import State
from qwen_cl.sweep.trial import hash_config
from tests.support.bos_tokenizers import KINDS, save_tokenizer
from tests.support.building import tokenizer
from tests.support.composed_configs import compose_run
from tests.support.corpora import json_lines, source, zstd
from tests.training.test_forgetting import demo_rows

BLANK_LINE, LINE, FILE = DocumentSeparator.blank_line, DocumentSeparator.line, DocumentSeparator.file
CONTENT = "\ufeff\n \t\nTitle\n\n  first line\nsecond line\n \u3000\n\x0c\n\n三番目。\n\n\nlast, without an end"
EXPECTED = [("Title", 3), ("  first line\nsecond line", 5), ("三番目。", 10), ("last, without an end", 13)]
LINES = [("Title", 3), ("  first line", 5), ("second line", 6), ("三番目。", 10), ("last, without an end", 13)]


def read(path: Path, separator: DocumentSeparator) -> list[tuple[str, str]]:
    files = find_files(str(path), "data.path")
    documents = list(read_files(files, "text", separator))
    progress = [document.progress for document in documents]
    assert progress == sorted(progress)
    assert progress[-1] <= sum(file.size for file in files)
    return [(document.text, document.where) for document in documents]


@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_documents_and_the_lines_they_begin_at(suffix: str, ends: str, tmp_path: Path) -> None:
    content = CONTENT.replace("\n", ends).encode()
    packed = {"": content, ".gz": gzip.compress(content, mtime=0), ".zst": zstd(content)}[suffix]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed)
    assert read(path, BLANK_LINE) == [(text, f"{path}:{line}") for text, line in EXPECTED]
    assert read(path, LINE) == [(text, f"{path}:{line}") for text, line in LINES]
    assert read(path, FILE) == [(content.decode("utf-8-sig"), str(path))]


def test_files_do_not_run_into_each_other(tmp_path: Path) -> None:
    for name, content in (("a.txt", "one"), ("b.txt", ""), ("c.txt", " \n\n"), ("d.txt", "two\n\nthree")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "e.jsonl").write_bytes(json_lines(["not\n\ncut"]))
    found = read(tmp_path, BLANK_LINE)
    assert [text for text, _ in found] == ["one", "", "", "two", "three", "not\n\ncut"]
    assert found[4][1] == f"{tmp_path}/d.txt:3"


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\n\ntwo\nthree é".encode("latin-1"))
    for separator in DocumentSeparator:
        with pytest.raises(UserError, match=rf"^{path}:4: byte 0xe9 at column 7 is not UTF-8"):
            read(path, separator)


def test_a_text_set_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    rows, places = read_set_rows(str(tmp_path / "a.txt"), "task.sets.a")
    assert ([getattr(row, "text", None) for row in rows], places) == (["one\n\ntwo\n"], [str(tmp_path / "a.txt")])


def config_for(path: Path, cache: Path, *overrides: str) -> TextDataConfig:
    data = compose_run("task=pretrain", "data=text", f"data.path='{path}'", *overrides).data
    assert isinstance(data, TextDataConfig)
    data.cache, data.workers = str(cache), 1
    return data


def prepared(tokenizer: Any, path: Path, cache: Path, *overrides: str) -> TextTarget:
    return prepare_target(config_for(path, cache, *overrides), 7, tokenizer, len(tokenizer))


@pytest.mark.slow
def test_a_text_file_trains_and_validates_by_default(tmp_path: Path) -> None:
    texts = [row["text"] for row in demo_rows("text.train.jsonl", 10)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    target = prepared(tokenizer(), path, tmp_path / "cache", "data.validation_fraction=0.2")
    trained, measured = target.split()
    assert (len(trained.documents), len(measured.documents)) == (8, 2)
    for selection in (trained, measured):
        kept = [texts[number] for number in selection.documents]
        assert [tokenizer().decode(ids) for ids in selection.texts()] == kept
        assert selection.text_bytes() == sum(len(text.encode()) for text in kept)
    assert summarize_validation(target)[1].startswith("2 documents of ")
    where = source(path)
    located = locate_document(type(where)(**{**_fields(where), "separator": BLANK_LINE}), 4)
    assert located == f"{path}:9"


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_end_of_the_only_document_validates(kind: str, share: float, tmp_path: Path) -> None:
    text = "".join(row["text"] for row in demo_rows("text.train.jsonl", 8)) + " 🎌🎌🎌 " * 5
    own = save_tokenizer(tmp_path / "tokenizer", kind)
    (tmp_path / "a.jsonl").write_bytes(json_lines([text]))
    target = prepared(own, tmp_path / "a.jsonl", tmp_path / "cache", f"data.validation_fraction={share}")
    target = TextTarget.parse(json.loads(json.dumps(target.plain())))
    trained, measured = target.split()
    ids = own(text, add_special_tokens=False)["input_ids"]
    (head,), (tail,) = ([part.tolist() for part in selection.texts()] for selection in (trained, measured))
    assert [*head, *tail] == ids
    assert 0 <= max(1, round(share * len(ids))) - len(tail) < 9
    before, after = own.decode(head), own.decode(ids)[len(own.decode(head)) :]
    assert before + after == text
    assert "\ufffd" not in before + after
    assert measured.text_bytes() == len(after.encode())
    delimiters = document_delimiters(own)
    (first,) = CorpusExamples(trained, 10**6, delimiters)
    (rest,) = CorpusExamples(measured, 10**6, delimiters)
    assert first.ids == [own.bos_token_id, *head]  # the document goes on: no end-of-text is learnt
    assert rest.ids == [own.bos_token_id, *tail, own.eos_token_id]  # and sees nothing of what trains
    assert summarize_validation(target) == ("", f"the last {len(tail) + 2} tokens of the one document validate")


@pytest.mark.slow
def test_a_document_too_short_to_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a", encoding="utf-8")
    with pytest.raises(UserError) as refused:
        prepared(tokenizer(), path, tmp_path / "cache")
    assert str(refused.value) == (
        f"data.path ({path}) is one document of 1 token, and data.validation_fraction (0.02) leaves none to train on; "
        "lower it, or set data.validation_path"
    )


def test_what_is_kept_in_the_cache_is_known_by_how_it_was_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one"]))

    def entry(name: str, separator: DocumentSeparator) -> str:
        where = type(source(""))(**{**_fields(source(tmp_path / name)), "separator": separator})
        return make_build_request(where, tokenizer(), workers=1, cache=str(tmp_path / "cache")).entry

    assert len({entry("a.txt", separator) for separator in DocumentSeparator}) == 3
    assert len({entry("a.jsonl", separator) for separator in DocumentSeparator}) == 1


@pytest.mark.parametrize(("name", "settled"), [("a.txt", BLANK_LINE), ("a.jsonl", FILE)])
def test_an_older_run_resumes_where_its_texts_are_split_alike(
    name: str, settled: DocumentSeparator, tmp_path: Path
) -> None:
    """Check a config without the key, whose text files were not split."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one"]))
    command = [
        "task=pretrain",
        "data=text",
        f"data.path={tmp_path / name}",
        "cluster.accelerator=cpu",
        "retention=none",
    ]
    plan = make_plan(compose_run(*command))
    assert isinstance(plan.config.data, TextDataConfig)
    assert plan.config.data.document_separator is settled
    folder = RunFolder(tmp_path / "run")
    folder.directory.mkdir()
    save_config(plan.config, folder.config)
    lines = folder.config.read_text(encoding="utf-8").splitlines(keepends=True)
    older = [line for line in lines if "document_separator" not in line]
    assert len(older) == len(lines) - 1
    folder.config.write_text("".join(older), encoding="utf-8")
    read_back = load_config(folder.config).data
    assert isinstance(read_back, TextDataConfig)
    assert read_back.document_separator is FILE
    folder.update_status(state=State.PREEMPTED)
    if name == "a.jsonl":
        resume(folder, plan.config, {})
        return
    with pytest.raises(
        UserError, match=r"data\.document_separator was file and is blank_line\. Restore the original overrides"
    ):
        resume(folder, plan.config, {})
    resume(folder, make_plan(compose_run(*command, "data.document_separator=file")).config, {})


def test_a_sweeps_older_trials_are_known_again(tmp_path: Path) -> None:
    """Compare with the hash of a config without the key."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    command = ["task=pretrain", "data=text", f"data.path={tmp_path}/a.txt", "cluster.accelerator=cpu", "retention=none"]
    hashes = [
        hash_config(make_plan(compose_run(*command, f"data.document_separator={separator.value}")))
        for separator in DocumentSeparator
    ]
    assert len(set(hashes)) == 3


@pytest.mark.slow
def test_bits_of_the_end_are_of_its_own_bytes(tmp_path: Path) -> None:
    """A cut within a character would count its bytes twice or not at all."""
    own = save_tokenizer(tmp_path / "tokenizer", "byte level")
    text = "🎌" * 50
    (tmp_path / "a.jsonl").write_bytes(json_lines([text]))
    for share in np.linspace(0.05, 0.6, 6):
        target = prepared(own, tmp_path / "a.jsonl", tmp_path / "cache", f"data.validation_fraction={share:.3f}")
        _, measured = target.split()
        (tail,) = measured.texts()
        assert measured.text_bytes() == len(own.decode(tail).encode())
        assert "\ufffd" not in own.decode(tail)
        assert math.isclose(len(tail), share * len(own(text)["input_ids"]), abs_tol=9)


@pytest.mark.parametrize("bos_then", [None, "<s>"])
def test_a_run_whose_texts_began_otherwise_is_resumed_only_where_that_is_said(
    bos_then: str | None, tmp_path: Path
) -> None:
    """Runs from before texts began with BOS recorded none."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "two"]))
    command = ["task=pretrain", "data=text", f"data.path={tmp_path / 'a.jsonl'}", "cluster.accelerator=cpu"]
    plan = make_plan(compose_run(*command, "retention=none"))
    folder = RunFolder(tmp_path / "run")
    folder.directory.mkdir()
    save_config(plan.config, folder.config)
    folder.update_status(state=State.PREEMPTED, bos_token=bos_then)
    facts = {"data.bos_token": "<s>"}
    if bos_then == "<s>":
        resume(folder, plan.config, facts)
        return
    with pytest.raises(UserError, match=r"data\.bos_token was .* and is <s>"):
        resume(folder, plan.config, facts)
    allowed = make_plan(compose_run(*command, "retention=none", "resume.allow_changes=[data.bos_token]"))
    resume(folder, allowed.config, facts)
