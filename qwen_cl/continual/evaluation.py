"""The evaluation of every set before the first stage and after each stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.fields import Scope, keys_of
from qwen_cl.config.overrides import override_key, quoted
from qwen_cl.config.renamed_keys import rename_mapping
from qwen_cl.config.task.continual import ContinualConfig
from qwen_cl.config.task.inference import EvaluateConfig
from qwen_cl.continual.child_process import launch
from qwen_cl.continual.stages import Stage, compose_config
from qwen_cl.data.set_files import set_hash
from qwen_cl.inference.evaluate import plan_evaluation


@dataclass(frozen=True, slots=True)
class StageLosses:
    """The losses of every set after one stage."""

    loss: list[float]
    """Nats per token, in the order of task.sets."""
    bits_per_byte: list[float]
    """In the order of task.sets."""


def evaluate_stage(
    task: ContinualConfig, first: Stage, stage: Stage | None, directory: Path, advice: str
) -> StageLosses:
    """Evaluate every set after ``stage``, or before the first stage if it is None.

    The results are kept in ``directory/evaluation.json``, and are read from it if the files and the settings of the
    evaluation are the same.

    Raises:
        RunFailed, RunPreempted: the evaluation did not complete.
    """
    output = directory / "evaluation.json"
    if (found := _read(output, task)) is None:
        output.unlink(missing_ok=True)
        overrides = [*evaluation_overrides(task, first, stage), f"task.output={quoted(str(output))}"]
        when = "before training" if stage is None else f"after {stage.name}"
        launch(f"the evaluation {when}", directory / "evaluation", overrides, advice)
        found = json.loads(output.read_text(encoding="utf-8"))
    sets = [found["sets"][name] for name in task.sets]
    return StageLosses([each["loss"] for each in sets], [each["bits_per_byte"] for each in sets])


def check_evaluation(task: ContinualConfig, first: Stage) -> None:
    """Check the evaluation before the first stage runs.

    Raises:
        UserError: a set or an override of the evaluation is invalid.
    """
    overrides = evaluation_overrides(task, first, None)
    config = compose_config(overrides)
    assert isinstance(config.task, EvaluateConfig)
    plan_evaluation(config, config.task, overrides)


def evaluation_overrides(task: ContinualConfig, first: Stage, stage: Stage | None) -> list[str]:
    """Return the overrides of the ``task=evaluate`` after a stage, or of the initial model."""
    sets = ", ".join(f"{name}: {quoted(path)}" for name, path in task.sets.items())
    overrides = ["task=evaluate", f"task.sets={{{sets}}}", *task.evaluation]
    if stage is not None:
        shared = _overrides_of(stage, keys_of(Scope.inference, Scope.access))
        return [*overrides, f"task.run={quoted(str(stage.folder.directory))}", *shared]
    return [*overrides, *_overrides_of(first, ("model", *keys_of(Scope.inference, Scope.rendering)))]


def _overrides_of(stage: Stage, keys: Sequence[str]) -> list[str]:
    """Return the stage's overrides of these keys or groups."""
    return [
        override
        for override in stage.overrides
        if (key := override_key(override)) in keys or key.partition(".")[0] in keys
    ]


def _read(path: Path, task: ContinualConfig) -> dict[str, Any] | None:
    """Read the results of an earlier evaluation; None if its files or settings were others."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    hashes = {name: each["sha256"] for name, each in found["sets"].items()}
    now = {name: set_hash(path, f"task.sets.{name}") for name, path in task.sets.items()}
    requested = compose_config(["task=evaluate", *task.evaluation]).task
    assert isinstance(requested, EvaluateConfig)
    loss_on = rename_mapping({"loss_on": found["loss_on"]}, "task")["loss_on"]
    same = (found["sequence_length"], loss_on) == (requested.sequence_length, requested.loss_on.value)
    return found if hashes == now and same else None
