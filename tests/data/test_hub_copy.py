"""Conversations from a dataset of the Hub: pinned, kept whole, read again without a network, and by a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from omegaconf import OmegaConf
from pyarrow import parquet

from tests.conftest import ROOT, launch
from tests.data.corpus.test_documents import run_python
from tests.support.dataset_hub import DatasetHub
from tests.support.hub import client_environment

pytestmark = pytest.mark.slow

CARD = b"---\nlicense: mit\n---\n"
CHAT = [{"role": "user", "content": "x", "weight": None}, {"role": "assistant", "content": "y", "weight": 1}]
READ = """
import json, sys
from dataclasses import replace
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from qwen_cl.config.errors import UserError
from qwen_cl.config.store import register_schemas
from qwen_cl.data.rows import content_hash, dataset_commits, pin_rows, read_rows, row_files, row_location
register_schemas()
with initialize_config_dir("CONF", version_base="1.3"):
    config = OmegaConf.to_object(compose("config", ["data=jsonl", "data.path=x", "data.validation_every=2"]))
answers = []
for path, validation, subset, fields in json.loads(sys.argv[1]):
    data = replace(config.data, path=path, validation_path=validation, subset=subset, fields=fields)
    try:
        pinned = pin_rows(data)
        again = pin_rows(pinned)
        assert again == pinned
        files = row_files(pinned, None)
        rows = [[[message.content for message in row.messages] for row in part] for part in read_rows(files)]
        place = row_location(files, 0, validation=True)
        answers.append([pinned.path, pinned.validation_path, rows, place, content_hash(files), dataset_commits(pinned)])
    except UserError as error:
        answers.append(str(error))
print(json.dumps([answers, "torch" in sys.modules]))
""".replace("CONF", str(ROOT / "conf"))


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def packed(rows: list[dict[str, Any]], path: Path) -> bytes:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def questions(*numbers: int) -> list[dict[str, Any]]:
    return [{"q": f"Question {number}?", "a": f"Answer {number}.", "score": 0.5} for number in numbers]


def test_a_dataset_is_pinned_with_all_its_columns_and_read_again_without_a_network(tmp_path: Path) -> None:
    with DatasetHub(tmp_path / "hub") as hub:
        files = {"train.jsonl": json_lines(questions(1, 2)), "test.jsonl": json_lines(questions(3)), "README.md": CARD}
        old = hub.publish("org/qa", files, "main", "v1")
        new = hub.publish("org/qa", {**files, "train.jsonl": json_lines(questions(4, 5))}, "main")
        chat = {"train.parquet": packed([{"messages": CHAT}] * 2, tmp_path / "a.parquet"), "README.md": CARD}
        commit = hub.publish("org/chat", chat, "main")
        environment = client_environment(hub.url, tmp_path / "home", QWEN_CL_CACHE=str(tmp_path / "cache"))
        reference, names = "hf://datasets/org/qa", {"prompt": "q", "completion": "a"}
        cases = [
            [reference, None, None, names],
            [f"{reference}@v1#train", f"{reference}#test", None, names],
            ["hf://datasets/org/chat", None, None, {}],
            [f"{reference}@{old}#test", f"{reference}@v1", None, names],
            [reference, None, "absent", names],
            [reference, None, None, {}],
            ["rows.jsonl", None, "ja", {}],
            ["hf://org/qa", None, None, {}],
        ]
        answers, has_torch = json.loads(run_python(READ, json.dumps(cases), environment))
    assert not has_torch
    newest, pair, messages, split, subset, names_missing, no_dataset, malformed = answers
    copies = tmp_path / "cache/datasets"
    assert newest[0] == f"{reference}@{new}#train"
    assert newest[2] == [[["Question 5?", "Answer 5."]], [["Question 4?", "Answer 4."]]]
    assert newest[3] == f"{copies}/org--qa/{new}/default.train.jsonl:1"
    assert newest[5] == {"data.path": new}
    assert pair[:2] == [f"{reference}@{old}#train", f"{reference}@{new}#test"]
    assert pair[2][0] == [[f"Question {number}?", f"Answer {number}."] for number in (1, 2)]
    assert pair[2][1] == [["Question 3?", "Answer 3."]]
    assert pair[5] == {"data.path": old, "data.validation_path": new}
    assert json.loads((copies / f"org--qa/{old}/default.train.jsonl").read_text().splitlines()[0]) == questions(1)[0]
    assert messages[2] == [[["x", "y"]]] * 2
    kept = [json.loads(line) for line in (copies / f"org--chat/{commit}/default.train.jsonl").read_text().splitlines()]
    assert kept[0]["messages"][0] == {"role": "user", "content": "x"}  # what Arrow filled in is not there
    assert split == (
        f"data.validation_path ({reference}@v1) cannot be read: Bad split: validation. Available splits: ['train', "
        f"'test']; name one of them after a #, as in {reference}@v1#test"
    )
    assert subset.startswith(f"data.path ({reference}) cannot be read: ")
    assert "; set data.subset" in subset or "absent" in subset
    assert names_missing.startswith(f"{copies}/org--qa/{new}/default.train.jsonl:1: no instruction form has these fie")
    assert no_dataset == "data.subset (ja) has no effect: data.path is not a dataset on the Hub; remove it"
    assert malformed.startswith(
        "data.path (hf://org/qa) must read hf://datasets/ORG/NAME, optionally with @REVISION and #SPLIT"
    )
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert json.loads(run_python(READ, json.dumps(cases[:3]), offline))[0] == answers[:3]


def test_a_run_keeps_its_commit_and_resumes_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [
        *("experiment=smoke", "data=jsonl", "data.path=hf://datasets/org/qa", "data.validation_path=null"),
        *("data.fields={prompt: q, completion: a}", "retention=none", "replay=none", "model.verify=none"),
        *("task.warmup_steps=0", "task.sample_prompts=0", "wandb.mode=disabled"),
    ]
    with DatasetHub(tmp_path / "hub") as hub:
        commit = hub.publish("org/qa", {"train.jsonl": json_lines(questions(*range(24))), "README.md": CARD}, "main")
        environment = client_environment(hub.url, tmp_path / "home", QWEN_CL_CACHE=str(tmp_path / "cache"))
        first = launch(*overrides, "task.max_steps=1", directory=run, environment=environment, warm=True)
        assert first.returncode == 0, first.stderr
        before = first.folder.status()
        hub.publish("org/qa", {"train.jsonl": json_lines(questions(*range(50, 60))), "README.md": CARD}, "main")
        longer = ("task.max_steps=2", "resume.allow_changes=[task.max_steps]")
        second = launch(*overrides, *longer, directory=run, environment=environment, warm=True)
    assert second.returncode == 0, second.stderr
    after = second.folder.status()
    assert OmegaConf.load(run / "config.yaml").data.path == f"hf://datasets/org/qa@{commit}#train"
    assert after.data_commits == before.data_commits == {"data.path": commit}
    assert after.data_sha256 == before.data_sha256
    assert (before.step, after.step) == (1, 2)
