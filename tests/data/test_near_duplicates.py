"""Validation texts that nearly repeat a training text are moved to the training set or reported, and stop no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.config.data import TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.saved import load_config
from qwen_cl.data.corpus.text_dataset import TextTarget
from qwen_cl.data.leakage import NearPairs
from qwen_cl.data.rows import Text, read_rows, row_location
from qwen_cl.data.statistics_text import summary
from qwen_cl.planning.plan import Plan, make_plan, with_text
from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.prepare import write_worker_inputs
from qwen_cl.training.recipe import build_recipe
from tests.support.composed_configs import compose_run
from tests.training.test_forgetting import demo_rows

LONG = [row["text"] for row in demo_rows("text.train.jsonl", 12)]


def edited(text: str) -> str:
    """Nearly the same: its first sentence, and all but the end of the rest."""
    return text[:-8] + "と言う。"


def written(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def planned(path: Path, *overrides: str, kind: str = "jsonl") -> Plan:
    said = ["task=pretrain", "cluster.accelerator=cpu", "retention=none", f"data={kind}", f"data.path={path}"]
    config = compose_run(*said, *overrides)
    plan = make_plan(config)
    return with_text(plan, config.data) if isinstance(config.data, TextDataConfig) else plan


def near_of(plan: Plan) -> NearPairs:
    assert plan.data_report is not None
    return plan.data_report.near_duplicates[0]


EVERY = "data.validation_every=4"
ROWS = [LONG[0], LONG[1], edited(LONG[4]), LONG[3], LONG[4], edited(LONG[0]), LONG[6], LONG[7], LONG[8], LONG[9]]
"""Held out are numbers 0, 4 and 8; of the first two there is another version that trains."""


def texts_of(plan: Plan) -> tuple[list[str], list[str]]:
    assert plan.files is not None
    train, validation = ([row.text for row in rows if isinstance(row, Text)] for rows in read_rows(plan.files))
    return train, validation


def test_they_are_moved_to_training_by_default(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", ROWS)
    plan = planned(path, EVERY)
    assert plan.files is not None
    assert plan.files.moved == (0, 4)
    train, validation = texts_of(plan)
    assert validation == [ROWS[8]]
    assert train == [text for text in ROWS if text != ROWS[8]]
    near = near_of(plan)
    assert near == NearPairs("validation rows", 2, 3, True, [(f"{path}:1", f"{path}:6"), (f"{path}:5", f"{path}:3")])
    assert plan.data_report is not None
    assert plan.data_report.rows == 9
    assert plan.data_report.overlap is not None
    assert (plan.data_report.overlap.texts, plan.data_report.overlap.found) == (1, 0)
    assert (
        "near duplicates",
        "2 of 3 validation rows are near duplicates of training texts (more than half of their 13-grams), moved "
        f"to training: {path}:1 ({path}:6), {path}:5 ({path}:3)",
    ) in summary(plan.data_report)
    for index, text in enumerate(train):
        assert row_location(plan.files, index, validation=False) == f"{path}:{ROWS.index(text) + 1}"
    assert row_location(plan.files, 0, validation=True) == f"{path}:9"


def test_they_are_reported_or_refused_where_that_is_said(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", ROWS)
    for said in ("data.near_duplicates=report", "data.allow_overlap=true"):
        plan = planned(path, EVERY, said)
        assert plan.files is not None
        assert plan.files.moved == ()
        assert (near_of(plan).count, near_of(plan).moved) == (2, False)
        assert texts_of(plan)[1] == [ROWS[0], ROWS[4], ROWS[8]]
    with pytest.raises(UserError) as refused:
        planned(path, EVERY, "data.near_duplicates=refuse")
    assert str(refused.value) == (
        f"{path}:1: this row, held out by data.validation_every (4), is in the training set too ({path}:6), as are 2 "
        "of 3 (0 identical, 2 with more than half of their 13-grams); their loss would measure what is memorized: "
        "remove them from the file, or write data.near_duplicates=report"
    )


def test_what_is_the_same_is_refused_whatever_is_said_of_near(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [*ROWS, ROWS[8]])
    for said in ("move", "report", "refuse"):
        with pytest.raises(UserError) as refused:
            planned(path, EVERY, f"data.near_duplicates={said}")
        assert str(refused.value).startswith(
            f"{path}:9: this row, held out by data.validation_every (4), is in the training set too ({path}:11), as "
            "are 3 of 3 (1 identical, 2 with"
        )


def test_what_a_moved_row_nearly_repeats_moves_too(tmp_path: Path) -> None:
    """Rows 1 and 5 are held out and alike; only the first is like one that trains."""
    half = len(LONG[0]) // 2
    first = LONG[0] + LONG[1][:half]
    rows = [
        first,
        LONG[0],
        LONG[2],
        LONG[3],
        LONG[1][: half + 10] + first[-half - 30 :],
        LONG[5],
        LONG[6],
        LONG[7],
        LONG[8],
    ]
    plan = planned(written(tmp_path / "a.jsonl", rows), EVERY)
    assert plan.files is not None
    assert plan.files.moved == (0, 4)


def test_nothing_left_to_validate_on_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [LONG[0], LONG[1], edited(LONG[0]), LONG[3]])
    with pytest.raises(UserError) as refused:
        planned(path, EVERY)
    assert str(refused.value) == (
        f"{path}:1: every row, held out by data.validation_every (4), is a near duplicate of a training text "
        f"(like {path}:3), which leaves nothing to validate on; set data.validation_path, or write "
        "data.near_duplicates=report"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_validation_set_of_its_own_keeps_them_and_says_so(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", LONG[:5])
    other = written(tmp_path / "b.jsonl", [LONG[9], edited(LONG[3])])
    plan = planned(path, f"data.validation_path={other}", kind=kind)
    near = near_of(plan)
    assert (near.count, near.of, near.moved, near.examples) == (1, 2, False, [(f"{other}:2", f"{path}:4")])
    assert plan.data_report is not None
    assert "still evaluated" in summary(plan.data_report)[3][1]


def test_the_worker_has_the_same_split(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", ROWS)
    plan, folder = planned(path, EVERY), RunFolder(tmp_path / "run")
    folder.directory.mkdir()
    write_worker_inputs(plan, folder)
    recipe = build_recipe(load_config(folder.config), plan.architecture, folder)
    assert recipe.data.moved == [0, 4]
    write_worker_inputs(planned(path, EVERY, "data.near_duplicates=report"), folder)  # the next start in this folder
    assert not folder.moved_rows.exists()


@pytest.mark.slow
def test_documents_are_moved_too_and_the_worker_knows(tmp_path: Path) -> None:
    path = written(tmp_path / "b.jsonl", [*LONG[:11], *map(edited, LONG[:2])])
    plan = planned(path, "data.validation_fraction=0.4", "seed=1", kind="text")
    assert plan.text is not None
    again = TextTarget.parse(json.loads(json.dumps(plan.text.plain())))
    before = planned(path, "data.validation_fraction=0.4", "seed=1", "data.near_duplicates=report", kind="text").text
    assert before is not None
    trained, kept = (set(selection.documents.tolist()) for selection in again.split())
    _, held_out = before.split()
    twins = {0: 11, 1: 12, 11: 0, 12: 1}
    moved = {n for n in held_out.documents.tolist() if n in twins and twins[n] not in held_out.documents}
    assert moved
    assert set(again.moved) == moved
    assert kept == set(held_out.documents.tolist()) - moved
    assert trained == set(range(13)) - kept
    assert near_of(plan).moved


@pytest.mark.slow
def test_headings_of_a_text_file_do_not_stop_it(tmp_path: Path) -> None:
    """Short pieces that are there twice train; a long one that is there twice is refused as ever."""
    pieces: list[str] = []
    for number, text in enumerate(LONG):
        pieces += ["* * *", text, f"第{number}章"]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(pieces), encoding="utf-8")
    plan = planned(path, "data.validation_fraction=0.4", "seed=2", kind="text")
    assert plan.text is not None
    held_out = [pieces[number] for number in plan.text.split()[1].documents]
    assert near_of(plan).moved
    assert "* * *" not in held_out
    assert len(held_out) > 3
    path.write_text("\n\n".join([*pieces, *LONG]), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"this document, held out by data.validation_fraction \(0.4\), is in the training"
    ):
        planned(path, "data.validation_fraction=0.4", "seed=2", kind="text")


def test_conversations_are_moved_as_texts_are(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": text[:20], "completion": text[20:]} for text in ROWS]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plan = make_plan(compose_run("cluster.accelerator=cpu", "retention=none", "data=jsonl", f"data.path={path}", EVERY))
    assert plan.files is not None
    assert plan.files.moved == (0, 4)


def test_embedded_data_stays_strict(tmp_path: Path) -> None:
    first = demo_rows("text.train.jsonl", 1)[0]["text"]
    kept = written(tmp_path / "kept.jsonl", [edited(first)])
    with pytest.raises(UserError, match=r"remove them from one side$"):
        make_plan(compose_run("task=pretrain", "retention=files", f"retention.eval_sets={{a: '{kept}'}}"))
