"""The settings of task=continual: a sequence of runs, each initialized from an earlier one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qwen_cl.config.errors import UserError
from qwen_cl.config.renamed_keys import rename_overrides
from qwen_cl.config.replay import check_names
from qwen_cl.config.task.training import TaskConfig

STAGE_NAME = re.compile(r"\w[\w-]*(\.[\w-]+)*")
"""Stage names, which become folder names: no slash, no leading, trailing or double dots."""
MODEL = "model"
"""Value of ``init_from`` for the given model."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """A stage of a continual run."""

    name: str
    init_from: str | None = None
    """An earlier stage, or ``model``; None for the previous stage, or the model for the first."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of this stage, after those of all stages."""
    eval_sets: list[str] = field(default_factory=list)
    """Sets that this stage trains for, needed for the transfer metrics. Sets of no stage are prior knowledge."""


@dataclass(kw_only=True, slots=True)
class ContinualConfig(TaskConfig):
    stages: list[StageConfig]
    overrides: list[str]
    """Overrides of all stages, before those of the command line."""
    sets: dict[str, str]
    """Files evaluated before the first stage and after each, by name."""
    evaluation: list[str]
    """Overrides of the evaluations, which are ``task=evaluate``."""

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
        """Return the number, from 1, of the first stage that trains for a set; 0 for none."""
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
        available = ", ".join([*before, MODEL])
        raise UserError(
            f"{where}.init_from ({stage.init_from}) is not a stage before {stage.name}; choose from {available}"
        )
    for name in stage.eval_sets:
        if name not in sets:
            raise UserError(f"{where}.eval_sets ({name}) is not a set; task.sets has {', '.join(sets) or 'none'}")
