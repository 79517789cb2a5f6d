"""The stages of ``task.stages``, all composed and checked before the first one runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen_cl.config.cluster import LocalConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Scope, keys_of
from qwen_cl.config.hydra_errors import explain, refuse_added_keys
from qwen_cl.config.override_text import refuse_parts
from qwen_cl.config.overrides import override_key, quoted
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.continual import MODEL, ContinualConfig, StageConfig
from qwen_cl.config.task.training import TrainingConfig
from qwen_cl.data.chat.settings import previous_template_date
from qwen_cl.models.adapter_methods import adapter_of
from qwen_cl.planning.plan import Plan, make_plan
from qwen_cl.runs.folder import RunFolder

MERGED = "export-merged"


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage, with its composed config and its plan."""

    number: int
    """From 1 on."""
    stage_config: StageConfig
    start: Stage | None
    """The stage whose result it starts from; None for the initial model."""
    folder: RunFolder
    overrides: list[str]
    """All overrides, in Hydra's order."""
    config: RunConfig
    plan: Plan

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage_config.name

    @property
    def result(self) -> Path:
        """The directory that a later stage starts from: the merged export of an adapter, or the last checkpoint."""
        if adapter_of(self.config.peft) is not None:
            return self.folder.directory / MERGED
        return self.folder.checkpoints / f"step={self.config.training.max_steps}"


def plan_stages(task: ContinualConfig, overrides: Sequence[str], directory: Path) -> list[Stage]:
    """Compose and plan every stage. ``overrides`` are the command line's, which all stages share.

    Raises:
        UserError: a stage is invalid; the message names it.
    """
    own = (*keys_of(Scope.command), "hydra", "experiment")
    shared = [override for override in overrides if override_key(override).partition(".")[0] not in own]
    stages: list[Stage] = []
    for number, stage in enumerate(task.stages, start=1):
        start = _start(stage, stages)
        folder = RunFolder(directory / f"{number:02}-{stage.name}")
        run_name = f"name={quoted(stage.name)}"  # in W&B
        merged = last_values([run_name, *task.overrides, *shared, *stage.overrides, *_start_overrides(start)])
        try:
            _refuse_overrides(stage, start)
            config = compose_config(merged)
            stages.append(Stage(number, stage, start, folder, merged, config, _plan(config, start, folder)))
        except UserError as error:
            raise UserError(f"task.stages[{number - 1}] ({stage.name}): {error}") from error
    return stages


def last_values(overrides: Sequence[str]) -> list[str]:
    """Return the last override of each key, in the order of the last ones, as Hydra takes a group's choice only once.

    A group that is chosen again discards the earlier overrides of its keys.
    """
    latest: dict[str, str] = {}
    for override in overrides:
        key = override_key(override)
        latest = {name: text for name, text in latest.items() if name != key and not name.startswith(f"{key}.")}
        latest[key] = override
    return list(latest.values())


def compose_config(overrides: Sequence[str]) -> RunConfig:
    """Compose a config as the launcher does.

    Raises:
        UserError: an override is invalid.
    """
    refuse_parts(overrides)
    try:
        composed = compose("config", list(overrides))
        refuse_added_keys(composed)
        return cast(RunConfig, OmegaConf.to_object(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def _start(stage: StageConfig, before: Sequence[Stage]) -> Stage | None:
    if stage.init_from == MODEL or not before:
        return None
    if stage.init_from is None:
        return before[-1]
    return next(earlier for earlier in before if earlier.name == stage.init_from)


def _start_overrides(start: Stage | None) -> list[str]:
    return [] if start is None else ["model=local", f"model.source={quoted(str(start.result))}", "model.adapter=null"]


def _refuse_overrides(stage: StageConfig, start: Stage | None) -> None:
    for override in stage.overrides:
        key = override_key(override)
        if key.partition(".")[0] in ("hydra", "dry_run"):
            raise UserError(f"{override} applies to the whole command; remove it from the stage")
        if start is not None and key in (MODEL, "model.source", "model.adapter"):
            raise UserError(
                f"{override}: the stage starts from {start.name}; remove it, or write init_from: {MODEL} to start "
                "from the initial model"
            )


def _plan(config: RunConfig, start: Stage | None, folder: RunFolder) -> Plan:
    """Plan a stage with the initial model, as the result of an earlier stage does not exist yet.

    Architecture and tokenizer are the same.
    """
    if not isinstance(config.task, TrainingConfig):
        raise UserError("a stage must train a model: task=pretrain or task=finetune")
    if not isinstance(config.cluster, LocalConfig):
        raise UserError("task=continual runs on one machine, with cluster=local; a cluster runs single runs and sweeps")
    while start is not None:
        config = replace(config, model=start.config.model)
        start = start.start
    return make_plan(config, run_date=previous_template_date([folder.config]))
