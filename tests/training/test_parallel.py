"""The embedded model trained by several processes: in every layout what one process trains."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.config.speed import When
from qwen_cl.planning.plan import make_plan
from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.prepare import write_worker_inputs
from tests.conftest import FEW
from tests.support import parallel_probe
from tests.support.exporting import composed
from tests.support.parallel_probe import Training
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

STEPS = 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"devices": 2, "tensor_parallel": 2},
    "sp2": {"devices": 2, "tensor_parallel": 2, "sequence_parallel": "true"},
    "pp2": {"devices": 2, "pipeline_parallel": 2},
    "dp2": {"devices": 2},
    "cp2": {"devices": 2, "context_parallel": 2},
    "tp2-pp2": {"devices": 4, "tensor_parallel": 2, "pipeline_parallel": 2},
    "sp2-cp2": {"devices": 4, "tensor_parallel": 2, "sequence_parallel": "true", "context_parallel": 2},
}
ADDED = {"fused_grad_accumulation": When.always}
SPEED: dict[str, dict[str, Any]] = {
    "tp2": {"fused_linear_cross_entropy": When.always, "fused_lora": When.always, **ADDED},
    "sp2": {
        "fused_linear_cross_entropy": When.always,
        "fused_lora": When.always,
        "activation_recompute": When.always,
        **ADDED,
    },
    "sp2-cp2": {"fused_linear_cross_entropy": When.always, "fused_lora": When.always},
    "pp2": {"fused_linear_cross_entropy": When.always, "activation_recompute": When.always, **ADDED},
    "dp2": {"fused_linear_cross_entropy": When.always, "cuda_graphs": When.always, **ADDED},
}
"""Levers that one process does without. Without a GPU the schedule of recorded passes is all there is of them: none of
these rows is as long as one that is recorded."""
OF_ONE_METHOD = {"sp2": "lora", "cp2": "lora", "sp2-cp2": "lora"}
"""For every weight, a wider layout says more of sequence parallelism."""
CASES = [(method, layout) for method in ("lora", "none") for layout in LAYOUTS]
CASES = [case for case in CASES if case[0] == OF_ONE_METHOD.get(case[1], case[0])] + [("dora", "one"), ("dora", "sp2")]
MOVES = (("tp2", 2), ("dp2", 4), ("one", STEPS))
"""A run that goes on in another layout: each with the step it gets to."""
LONGEST_ROW = 127
"""Positions, in the demo's data: where two rows have more, one of them is packed."""
TIMELESS = ("loss", "bits_per_byte", "tokens", "grad_norm", "lr", "step")
"""Ends of the names of what is no matter of time or memory."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all runs, in one group for each number of ranks; the widest first, as a move ends in one process."""
    base = tmp_path_factory.mktemp("parallel")
    trainings = [_training(base / f"{method}-{layout}", method, layout, STEPS) for method, layout in CASES]
    for method in ("lora", "none"):
        before = None
        for layout, last_step in MOVES:
            folder = base / f"{method}-moved-{layout}"
            trainings.append(_training(folder, method, layout, last_step, before))
            before = folder
    for ranks in (4, 2, 1):
        own = [training for training in trainings if _ranks(training.directory.name) == ranks]
        done = run_ranks(parallel_probe.main, own, ranks=ranks)
        assert done.returncode == 0, done.log[-4000:]
    return base


def _ranks(name: str) -> int:
    layout = name.partition("-")[2].removeprefix("moved-")
    return int(LAYOUTS[layout].get("devices", 1))


def _training(folder: Path, method: str, layout: str, last_step: int, before: Path | None = None) -> Training:
    overrides = [f"peft={method}", "experiment=smoke", "wandb.mode=disabled", "cluster.accelerator=cpu"]
    overrides += [f"cluster.{key}={value}" for key, value in LAYOUTS[layout].items()]
    overrides += ["task.micro_batch_size=1", "task.global_batch_size=2", "task.sequence_length=160", "retention=none"]
    overrides += [f"task.max_steps={STEPS}", "task.val_check_interval=100", "task.checkpoint_interval=100"]
    overrides += ["task.sample_prompts=1", "model.verify=none", "lr=2e-3", FEW]
    folder.mkdir()
    plan = make_plan(composed(*overrides))
    config = replace(plan.config, speed=replace(plan.config.speed, **SPEED.get(layout, {})))
    write_worker_inputs(replace(plan, config=config), RunFolder(folder))
    return Training(folder, last_step, before, saves="moved" in folder.name)


def _records(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, RunFolder(folder).metrics_file.read_text().splitlines())
    return [{key: value for key, value in line.items() if key.endswith(TIMELESS)} for line in lines]


@pytest.mark.parametrize(("method", "layout"), [case for case in CASES if case[1] != "one"])
def test_a_layout_trains_what_one_process_trains(method: str, layout: str, directory: Path) -> None:
    expected, found = (_records(directory / f"{method}-{name}") for name in ("one", layout))
    losses = [record["train/loss"] for record in expected if "train/loss" in record]
    assert len(losses) == STEPS
    steps = [record["tokens"] for record in expected if "train/loss" in record]
    assert max(after - before for before, after in pairwise(steps)) > 2 * LONGEST_ROW, "no row was packed"
    assert losses[0] - losses[-1] > 0.1, "training changed nothing, so this test shows nothing"
    assert [list(record) for record in found] == [list(record) for record in expected]
    for one, other in zip(expected, found):
        _check(other, one)


@pytest.mark.parametrize(("method", "layout"), [case for case in CASES if case[1] != "one"])
def test_a_layout_answers_what_one_process_answers(method: str, layout: str, directory: Path) -> None:
    """Compare the answers before and after training; with context parallelism there are none."""
    expected, found = (RunFolder(directory / f"{method}-{name}").samples for name in ("one", layout))
    if LAYOUTS[layout].get("context_parallel", 1) > 1:
        assert not found.exists()
        return
    answers = [json.loads(line)["answer"] for line in expected.read_text(encoding="utf-8").splitlines()]
    assert len(set(answers)) == 2
    assert found.read_text(encoding="utf-8") == expected.read_text(encoding="utf-8")


@pytest.mark.parametrize(("method", "layout"), [case for case in CASES if case[1] in SPEED])
def test_speed_optimizations_are_enabled_where_results_are_compared(method: str, layout: str, directory: Path) -> None:
    levers = RunFolder(directory / f"{method}-{layout}").status().speed_optimizations
    absent = (
        {"fused_linear_cross_entropy"} if layout == "pp2" else set()
    )  # the first rank speaks, and has no output layer
    absent |= {"fused_lora"} if method != "lora" else set()
    assert levers.keys() >= SPEED[layout].keys() - absent


@pytest.mark.parametrize("method", ["lora", "none"])
def test_a_run_resumes_in_another_layout(method: str, directory: Path) -> None:
    expected = {record["step"]: record for record in _records(directory / f"{method}-one") if "train/loss" in record}
    found = [
        record
        for layout, _ in MOVES
        for record in _records(directory / f"{method}-moved-{layout}")
        if "train/loss" in record
    ]
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for record in found:
        _check({**record, "tokens": expected[record["step"]]["tokens"]}, expected[record["step"]])


def _check(found: dict[str, float], expected: dict[str, float]) -> None:
    """Losses to a few of fp32's last bits. The norm of the gradient of many weights is itself a sum in fp32, which for
    one process and all weights is 2e-6 from what it is in fp64."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=5e-5 if name == "optim/grad_norm" else 2e-6), name
