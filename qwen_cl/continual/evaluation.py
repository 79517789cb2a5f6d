"""Every set evaluated at one point of the chain. The chain asks through ``measure`` alone."""

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
class Measured:
    loss: list[float]
    bits_per_byte: list[float]
    """In the order of task.sets."""


def measure(task: ContinualConfig, first: Stage, stage: Stage | None, directory: Path, advice: str) -> Measured:
    """After ``stage``; None for before the first. What was measured before on the same files is taken from its file,
    ``directory/evaluation.json``.

    Raises:
        RunFailed, RunPreempted: the evaluation did not complete.
    """
    output = directory / "evaluation.json"
    if (found := _read(output, task)) is None:
        output.unlink(missing_ok=True)
        said = [*evaluation_overrides(task, first, stage), f"task.output={quoted(str(output))}"]
        launch(f"the evaluation {after(stage)}", directory / "evaluation", said, advice)
        found = json.loads(output.read_text(encoding="utf-8"))
    sets = [found["sets"][name] for name in task.sets]
    return Measured([each["loss"] for each in sets], [each["bits_per_byte"] for each in sets])


def after(stage: Stage | None) -> str:
    return "before training" if stage is None else f"after {stage.name}"


def check_evaluation(task: ContinualConfig, first: Stage) -> None:
    """Raises UserError where a set or an override of the evaluation is not what it must be."""
    overrides = evaluation_overrides(task, first, None)
    config = compose_config(overrides)
    assert isinstance(config.task, EvaluateConfig)
    plan_evaluation(config, config.task, overrides)


def evaluation_overrides(task: ContinualConfig, first: Stage, stage: Stage | None) -> list[str]:
    sets = ", ".join(f"{name}: {quoted(path)}" for name, path in task.sets.items())
    said = ["task=evaluate", f"task.sets={{{sets}}}", *task.evaluation]
    if stage is not None:
        return [
            *said,
            f"task.run={quoted(str(stage.folder.directory))}",
            *_of(stage, keys_of(Scope.inference, Scope.access)),
        ]
    return [*said, *_of(first, ("model", *keys_of(Scope.inference, Scope.rendering)))]


def _of(stage: Stage, keys: Sequence[str]) -> list[str]:
    """What was said of these keys or groups."""
    return [
        override
        for override in stage.overrides
        if (key := override_key(override)) in keys or key.partition(".")[0] in keys
    ]


def _read(path: Path, task: ContinualConfig) -> dict[str, Any] | None:
    """None where it is of other files, or measured otherwise."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    hashes = {name: each["sha256"] for name, each in found["sets"].items()}
    now = {name: set_hash(path, f"task.sets.{name}") for name, path in task.sets.items()}
    wanted = compose_config(["task=evaluate", *task.evaluation]).task
    assert isinstance(wanted, EvaluateConfig)
    loss_on = rename_mapping({"loss_on": found["loss_on"]}, "task")["loss_on"]
    same = (found["sequence_length"], loss_on) == (wanted.sequence_length, wanted.loss_on.value)
    return found if hashes == now and same else None
