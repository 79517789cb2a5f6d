"""Mistakes in what is replayed, and in what must not be forgotten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.planning.plan import make_plan
from tests.conftest import ROOT
from tests.support.composed_configs import compose_run
from tests.test_errors import refuse
from tests.training.test_forgetting import DATA

GOOD = DATA / "retention-english.jsonl"
SETS = {"replay": "datasets", "retention": "eval_sets"}
TWO = f"replay.datasets={{english: '{GOOD}', old: '{GOOD}'}}"
REFUSED: dict[str, tuple[list[str], str]] = {
    "sum": (
        ["replay=files", TWO, "replay.weights={english: 0.5, old: 0.3}"],
        r"replay\.weights sum to 0\.8; they must sum to 1 \(replay\.ratio says how much is replayed in all\)",
    ),
    "another set": (
        ["replay=files", TWO, "replay.weights={english: 0.5, new: 0.5}"],
        r"replay\.weights names english, new, and replay\.datasets english, old; give every set a weight, or none",
    ),
    "a set without weight": (
        ["replay=files", TWO, "replay.weights={english: 1}"],
        r"replay\.weights names english, and replay\.datasets english, old; give every set a weight",
    ),
    "weight 0": (
        ["replay=files", TWO, "replay.weights={english: 1, old: 0}"],
        r"replay\.weights\.old \(0\.0\) must be above 0",
    ),
    "share 0": (["replay=files", TWO, "replay.ratio=0"], r"replay\.ratio \(0\.0\) must be above 0"),
    "share 1": (["replay=files", TWO, "replay.ratio=1"], r"replay\.ratio \(1\.0\) must be below 1"),
    "generated share": (["replay=generated", "replay.ratio=1"], r"replay\.ratio \(1\.0\) must be below 1"),
    "generated tokens": (["replay=generated", "replay.tokens=0"], r"replay\.tokens \(0\) must be at least 1"),
    "temperature": (["replay=generated", "replay.temperature=0"], r"replay\.temperature \(0\.0\) must be above 0"),
    "top_p": (["replay=generated", "replay.top_p=1.1"], r"replay\.top_p \(1\.1\) must be at most 1"),
    "max_length": (["replay=generated", "replay.max_length=1"], r"replay\.max_length \(1\) must be at least 2"),
    "random tokens": (
        ["replay=demo", "data=mock"],
        r"replay\.ratio \(0\.25\) has no effect with data=mock, which is random tokens alone; write replay=none",
    ),
    "no sets": (["replay=files", "replay.datasets={}"], r"replay\.datasets is empty; write .*, or replay=none"),
    "replay's name": (
        ["replay=files", "replay.datasets={a b: x.jsonl}"],
        r"replay\.datasets: 'a b' must be letters, digits",
    ),
    "retention's name": (
        ["retention=files", "retention.eval_sets={_old: x}"],
        r"retention\.eval_sets: '_old' must be letters",
    ),
    "empty path": (
        ["retention=files", "retention.eval_sets={english: ' '}"],
        r"retention\.eval_sets\.english is empty; name a",
    ),
    "missing": (
        ["replay=files", "replay.datasets={english: /no/such.jsonl}"],
        r"replay\.datasets\.english \(/no/such\.jsonl\) does not exist; name a file, a glob, a directory, or hf://datasets/",
    ),
    "missing retention": (
        ["retention=files", "retention.eval_sets={kept: /no/such.txt}"],
        r"retention\.eval_sets\.kept \(/no/such\.txt\) does not exist; name a file",
    ),
    "format": (
        ["retention=files", f"retention.eval_sets={{kept: '{ROOT / 'LICENSE'}'}}"],
        r"retention\.eval_sets\.kept: .*/LICENSE is of an unknown format; known are \.txt, \.jsonl",
    ),
    "schedule": (
        ["task.lr_schedule=warmup_hold_decay", "task.max_steps=10", "task.warmup_steps=4", "task.decay_ratio=0.7"],
        r"task\.warmup_steps \(4\) and task\.decay_ratio \(0\.7 of task\.max_steps, 7 steps\) are more than "
        r"task\.max_steps \(10\); lower one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_reported(name: str) -> None:
    said, message = REFUSED[name]
    with pytest.raises(UserError, match=f"^{message}") as caught:
        make_plan(compose_run("task=pretrain", *said))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["replay", "retention"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ('{"prompt": "a", "completion": "b"}', "field 'text' is missing (found: 'prompt', 'completion')"),
        ('{"text": " "}', "field 'text' is empty"),
    ],
)
def test_a_broken_line_of_a_set_is_named(key: str, line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}:3: {message}')}"):
        make_plan(compose_run("task=pretrain", f"{key}=files", f"{key}.{SETS[key]}={{english: '{path}'}}"))


@pytest.mark.slow
def test_the_launcher_says_it_in_one_line(tmp_path: Path) -> None:
    said, message = REFUSED["sum"]
    assert re.match(message, refuse("task=pretrain", *said, directory=tmp_path))
