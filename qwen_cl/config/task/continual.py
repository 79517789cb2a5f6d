"""``task=continual``: a chain of runs, each starting from another's result. Values live in conf/task/continual.yaml."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qwen_cl.config.errors import UserError
from qwen_cl.config.renamed_keys import rename_overrides
from qwen_cl.config.replay import check_names
from qwen_cl.config.task.training import TaskConfig

STAGE_NAME = re.compile(r"\w[\w-]*(\.[\w-]+)*")
"""Becomes part of a folder's name: no slash, no dot at either end, no two of them."""
MODEL = "model"
"""What ``init_from`` says for the model given, which is no stage."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    name: str
    init_from: str | None = None
    """A stage before this one, or ``model``; None for the stage just before, and the model for the first."""
    overrides: list[str] = field(default_factory=list)
    """As on the command line, after those that all stages share."""
    eval_sets: list[str] = field(default_factory=list)
    """The sets this stage is for; the measures of transfer need it. A set no stage teaches is what the model knew."""


@dataclass(kw_only=True, slots=True)
class ContinualConfig(TaskConfig):
    stages: list[StageConfig]
    overrides: list[str]
    """Of every stage, before those of the command line."""
    sets: dict[str, str]
    """Files evaluated before the first stage and after each, by name."""
    evaluation: list[str]
    """Overrides of the ``task=evaluate`` that does it."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("task.stages is empty; name at least one stage")
        self.overrides, self.evaluation = rename_overrides(self.overrides), rename_overrides(self.evaluation)
        for stage in self.stages:
            stage.overrides = rename_overrides(stage.overrides)
        names = [stage.name for stage in self.stages]
        for number, stage in enumerate(self.stages):
            _check_stage(stage, f"task.stages[{number}]", names[:number], self.sets)
        check_names("task.sets", self.sets)

    def taught_in(self, name: str) -> int:
        """Number of the stage, from 1 on, that first teaches a set; 0 for none."""
        return next((number for number, stage in enumerate(self.stages, start=1) if name in stage.eval_sets), 0)


def _check_stage(stage: StageConfig, where: str, before: list[str], sets: dict[str, str]) -> None:
    if not STAGE_NAME.fullmatch(stage.name) or stage.name == MODEL:
        raise UserError(
            f"{where}.name ({stage.name}) becomes the name of a folder: write letters, digits, '_', '-' and single "
            f"dots inside, and not '{MODEL}'"
        )
    if stage.name in before:
        raise UserError(f"{where}.name ({stage.name}) is taken by task.stages[{before.index(stage.name)}]; rename one")
    if stage.init_from not in (None, MODEL, *before):
        there = ", ".join([*before, MODEL])
        raise UserError(f"{where}.init_from ({stage.init_from}) names no stage before {stage.name}; there are {there}")
    for name in stage.eval_sets:
        if name not in sets:
            raise UserError(f"{where}.eval_sets ({name}) is no set; task.sets has {', '.join(sets) or 'none'}")
