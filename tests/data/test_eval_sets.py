"""Sets by name: in every form that a corpus may have, and known again by what they hold."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.conversations import pair
from qwen_cl.data.eval_sets import local_sets, read_sets
from qwen_cl.data.rows import Text
from qwen_cl.data.set_files import set_hash, with_set_hashes
from qwen_cl.planning.plan import make_plan
from tests.conftest import ROOT
from tests.data.corpus.test_documents import run_python
from tests.support.composed_configs import compose_run
from tests.support.corpora import FORMS, TEXTS, json_lines, zstd
from tests.support.dataset_hub import DatasetHub
from tests.support.hub import client_environment

DEMO = ROOT / "qwen_cl/demo/data"
ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
]


@pytest.mark.parametrize("form", FORMS)
def test_texts_of_every_form_are_rows_with_their_places(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path, TEXTS)
    (found,) = read_sets({"old": str(path)}, "retention.eval_sets")
    assert found.rows == [Text(text) for text in TEXTS]
    assert found.is_text
    assert len(set(found.places)) == len(TEXTS)
    assert all(place.startswith(str(tmp_path)) for place in found.places)


def test_places_are_lines() -> None:
    path = DEMO / "retention-english.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    (found,) = read_sets({"english": str(path)}, "retention.eval_sets")
    for row, place in zip(found.rows, found.places, strict=True):
        name, _, line = place.rpartition(":")
        assert isinstance(row, Text)
        assert (name, json.loads(lines[int(line) - 1])["text"]) == (str(path), row.text)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows.parquet"])
def test_conversations_may_be_packed_too(name: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if name.endswith("parquet"):
        parquet.write_table(Table.from_pylist(ROWS[1:]), tmp_path / name)
        expected = [pair("c", "d")]
    else:
        (tmp_path / name).write_bytes(gzip.compress(lines, mtime=0) if name.endswith("gz") else lines)
        expected = [pair("a", "b"), pair("c", "d")]
    (found,) = read_sets({"old": str(tmp_path / name)}, "replay.datasets")
    assert found.rows == expected
    assert not found.is_text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n\n{"te\n', mtime=0), "{path}:3: not JSON (Unterminated string"),
        (
            "a.jsonl.zst",
            zstd(json_lines(["x"]) + b'{"text": "\xe9"}\n'),
            "{path}:2: byte 0xe9 at column 11 is not UTF-8",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            "{path}:2: field 'text' is missing (found: 'body'); every row of",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": "  "}\n', "{path}:2: field 'text' is empty; remove the row or fill it"),
        ("a.jsonl", b'{"prompt": "x"}\n', "{path}:1: field 'completion' is missing"),
        (
            "a.jsonl.gz",
            gzip.compress(b"\n \n", mtime=0),
            "{path} is empty; it must hold rows, or a text",
        ),
        ("a.txt.gz", gzip.compress(b"\n", mtime=0), "{path}: the text is empty; remove the row or fill it"),
        ("a.doc", b"text\nx\n", "retention.eval_sets.old: {path} is of an unknown format; known are .txt, .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_sets({"old": str(path)}, "retention.eval_sets")
    assert str(refused.value).startswith(message.format(path=path))
    assert "\n" not in str(refused.value)


def test_the_hash_is_of_what_a_set_holds_in_the_order_of_its_files(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_bytes(json_lines(["a"]))
    assert set_hash(str(one), "k") == hashlib.sha256(one.read_bytes()).hexdigest()
    other.write_bytes(json_lines(["b"]))
    both = set_hash(f"{tmp_path}/*.jsonl", "k")
    assert both == set_hash(str(tmp_path), "k")
    shutil.move(one, tmp_path / "z.jsonl")
    assert set_hash(str(tmp_path), "k") != both
    shutil.move(other, one)
    other.write_bytes(one.read_bytes())
    shutil.move(tmp_path / "z.jsonl", one)
    assert set_hash(str(tmp_path), "k") == both


def plan_hash(*said: str) -> str | None:
    return make_plan(compose_run("task=pretrain", "cluster.accelerator=cpu", *said)).data_hash


@pytest.mark.slow
def test_a_run_that_replays_or_retains_something_else_is_another(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_bytes(json_lines(["Something old."]))
    (tmp_path / "moved.jsonl").write_bytes(json_lines(["Something old."]))
    replay = ["replay=files", "retention=none", "replay.ratio=0.1"]
    found = plan_hash(*replay, f"replay.datasets={{a: '{tmp_path / 'old.jsonl'}'}}")
    assert plan_hash(*replay, f"replay.datasets={{a: '{tmp_path / 'moved.jsonl'}'}}") == found
    (tmp_path / "moved.jsonl").write_bytes(json_lines(["Something else."]))
    others = [
        plan_hash(*replay, f"replay.datasets={{a: '{tmp_path / 'moved.jsonl'}'}}"),
        plan_hash(*replay, f"replay.datasets={{b: '{tmp_path / 'old.jsonl'}'}}"),
        plan_hash("retention=files", f"retention.eval_sets={{a: '{tmp_path / 'old.jsonl'}'}}"),
        plan_hash("retention=none"),
        plan_hash(),
    ]
    assert len({found, *others}) == 6


def test_where_nothing_is_replayed_or_retained_the_hash_is_that_of_the_data_alone() -> None:
    content = b"".join((DEMO / f"text.{part}.jsonl").read_bytes() for part in ("train", "validation"))
    alone = hashlib.sha256(content).hexdigest()
    assert plan_hash("retention=none") == alone
    # Text that the model writes itself follows from model, seed and config.
    assert plan_hash("retention=none", "replay=generated") == alone
    assert with_set_hashes(alone, {"replay.datasets": {}, "retention.eval_sets": {}}) == alone
    kept = hashlib.sha256((DEMO / "retention-english.jsonl").read_bytes()).hexdigest()
    spelled_out = json.dumps({"retention.sets": {"english": kept}, "target": alone})
    assert plan_hash() == hashlib.sha256(spelled_out.encode()).hexdigest()


READ = """
import json, sys
from qwen_cl.config.errors import UserError
from qwen_cl.data.eval_sets import local_sets, read_sets
from qwen_cl.data.set_files import set_hash
answers = []
for path in json.loads(sys.argv[1]):
    try:
        (found,) = read_sets(local_sets({"a": path}, "task.sets"), "task.sets")
        answers.append([[str(row) for row in found.rows], found.path, set_hash(path, "task.sets.a")])
    except UserError as error:
        answers.append(str(error))
print(json.dumps([answers, "torch" in sys.modules]))
"""


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_kept_by_its_commit(tmp_path: Path) -> None:
    """Check that a process without a network or a token reads the pinned data."""
    with DatasetHub(tmp_path / "hub") as hub:
        rows = "".join(json.dumps({**row, "unused": 1}) + "\n" for row in ROWS[:1]).encode()
        files = {"train.jsonl": json_lines(TEXTS[:4]), "test.jsonl": json_lines(TEXTS[4:5]), "README.md": b"---\n---\n"}
        hub.publish("org/texts", files, "main", "v1")
        hub.publish("org/chat", {"train.jsonl": rows, "README.md": b"---\n---\n"}, "main")
        environment = client_environment(hub.url, tmp_path / "home", QWEN_CL_CACHE=str(tmp_path / "cache"))
        texts = "hf://datasets/org/texts"
        cases = [texts, f"{texts}#test", "hf://datasets/org/chat", f"{texts}#dev", "hf://org/texts"]
        answers, has_torch = json.loads(run_python(READ, json.dumps(cases), environment))
    assert not has_torch
    train, test, chat, split, malformed = answers
    assert train[0] == [str(Text(text)) for text in TEXTS[:4]]
    assert test[0] == [str(Text(TEXTS[4]))]
    assert chat[0] == [str(pair("a", "b"))]
    for _, path, content in (train, test, chat):
        assert tmp_path / "cache/datasets" in Path(path).parents
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == content
    assert split.startswith(f"task.sets.a ({texts}) cannot be read: Bad split: dev.")
    assert split.endswith(f"; name one of them after a #, as in {texts}#test")
    assert malformed.startswith("task.sets.a (hf://org/texts) must read hf://datasets/ORG/NAME, optionally with @")
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert json.loads(run_python(READ, json.dumps(cases[:3]), offline))[0] == answers[:3]


def test_paths_are_made_to_mean_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    named = {"a": "below/*.jsonl", "b": "~/b.txt"}
    found = local_sets(named, "task.sets")
    assert found == {"a": f"{tmp_path}/below/*.jsonl", "b": f"{tmp_path}/home/b.txt"}
