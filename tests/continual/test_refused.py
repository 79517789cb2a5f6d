"""``task=continual``: the errors that are found before the first stage runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen_cl.config.errors import UserError
from tests.continual.test_run_stages import SHARED, run_here


def stages(*more: str) -> str:
    """Return the override of two stages, the second with these fields."""
    return "task.stages=[{name: one, overrides: [task=pretrain]}, {" + ", ".join(more) + "}]"


REFUSED: dict[str, tuple[list[str], str]] = {
    "none": (["task.stages=[]"], r"task\.stages is empty; name at least one stage"),
    "missing stage": (
        [stages("name: two", "init_from: zero")],
        r"task\.stages\[1\]\.init_from \(zero\) is not a stage before two; choose from one, model$",
    ),
    "itself": ([stages("name: two", "init_from: two")], r"\(two\) is not a stage before two; choose from one, model$"),
    "same name": ([stages("name: one")], r"task\.stages\[1\]\.name \(one\) is taken by task\.stages\[0\]; rename one"),
    "above": ([stages("name: ../x")], r"task\.stages\[1\]\.name \(\.\./x\) becomes the name of a folder"),
    "dots": ([stages("name: a..b")], r"task\.stages\[1\]\.name \(a\.\.b\) becomes the name of a folder"),
    "slash": ([stages("name: a/b")], r"task\.stages\[1\]\.name \(a/b\) becomes the name of a folder"),
    "reserved": ([stages("name: model")], r"task\.stages\[1\]\.name \(model\) becomes .*, and not 'model'"),
    "no such set": (
        [stages("name: two", "eval_sets: [ja]")],
        r"task\.stages\[1\]\.eval_sets \(ja\) is not a set; .* none",
    ),
    "typo": (
        [stages("name: two", "overrides: [task.max_step=3]")],
        r"task\.stages\[1\] \(two\): task\.max_step: unknown key; did you mean task\.max_steps\?",
    ),
    "no such choice": (
        [stages("name: two", "overrides: [peft=lor]")],
        r"task\.stages\[1\] \(two\): peft=lor: no such choice; did you mean peft=lora\?",
    ),
    "bad value": (
        [stages("name: two", "overrides: [task.warmup_steps=1000]")],
        r"task\.stages\[1\] \(two\): task\.warmup_steps \(1000\) must be less than task\.max_steps \(40\)",
    ),
    "no data": (
        [stages("name: two", "overrides: [data=jsonl, data.path=/no/such.jsonl]")],
        r"task\.stages\[1\] \(two\): data\.path \(/no/such\.jsonl\) does not exist",
    ),
    "no training": (
        [stages("name: two", "overrides: [task=inspect]")],
        r"task\.stages\[1\] \(two\): a stage must train a model: task=pretrain or task=finetune",
    ),
    "a cluster": (
        [stages("name: two", "overrides: [cluster=slurm]")],
        r"task\.stages\[1\] \(two\): task=continual runs on one machine, with cluster=local; a cluster",
    ),
    "of the command": (
        [stages("name: two", "overrides: [hydra.run.dir=x]")],
        r"task\.stages\[1\] \(two\): hydra\.run\.dir=x applies to the whole command; remove it from the stage",
    ),
    "two models": (
        [stages("name: two", "overrides: [model=qwen2.5-7b]")],
        r"model=qwen2\.5-7b: the stage starts from one; remove it, or write init_from: model to start from",
    ),
    "no set": (
        ["task.sets={ja: /no/such.txt}", stages("name: two")],
        r"task\.sets\.ja \(/no/such\.txt\) does not exist; name a file, a glob, a directory, or hf://datasets/ORG/NAME",
    ),
    "set name": (["task.sets={a b: x}", stages("name: two")], r"task\.sets: 'a b' must be letters"),
    "evaluation": (
        ["task.sets={ja: x.jsonl}", "task.evaluation=[task.batch_size=0]", stages("name: two")],
        r"task\.batch_size \(0\) must be at least 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_reported_before_the_first_stage(name: str, tmp_path: Path) -> None:
    said, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        run_here(tmp_path / "chain", "task=continual", *map(_quote_overrides, said), *SHARED)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "chain").exists()


def _quote_overrides(said: str) -> str:
    """Quote the overrides inside a list, as Hydra requires."""
    return re.sub(r"(?<=[\[ ])([\w.]+=[^,\]]+)(?=[,\]])", r"'\1'", said)
