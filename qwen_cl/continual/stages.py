"""From ``task.stages`` to composed, checked stages: a mistake in the last is told before the first runs."""

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
    number: int
    """From 1 on."""
    said: StageConfig
    start: Stage | None
    """None for the model given."""
    folder: RunFolder
    overrides: list[str]
    """All of them, in Hydra's order."""
    config: RunConfig
    plan: Plan

    @property
    def name(self) -> str:
        return self.said.name

    @property
    def result(self) -> Path:
        """The directory a later stage starts from: an adapter's run is exported for it, else the checkpoint will do."""
        if adapter_of(self.config.peft) is not None:
            return self.folder.directory / MERGED
        return self.folder.checkpoints / f"step={self.config.training.max_steps}"


def plan_stages(task: ContinualConfig, overrides: Sequence[str], directory: Path) -> list[Stage]:
    """``overrides`` are the user's own words; those of the groups that stages have are said to each.

    Raises:
        UserError: names the stage.
    """
    own = (*keys_of(Scope.command), "hydra", "experiment")
    shared = [override for override in overrides if override_key(override).partition(".")[0] not in own]
    stages: list[Stage] = []
    for number, said in enumerate(task.stages, start=1):
        start = _start(said, stages)
        folder = RunFolder(directory / f"{number:02}-{said.name}")
        named = f"name={quoted(said.name)}"  # on the dashboard
        every = last_values([named, *task.overrides, *shared, *said.overrides, *_start_overrides(start)])
        try:
            _refuse_overrides(said, start)
            config = compose_config(every)
            stages.append(Stage(number, said, start, folder, every, config, _plan(config, start, folder)))
        except UserError as error:
            raise UserError(f"task.stages[{number - 1}] ({said.name}): {error}") from error
    return stages


def last_values(overrides: Sequence[str]) -> list[str]:
    """The last override of each key, where it stood last: Hydra takes a group once. A group chosen again leaves nothing
    of what was said of its keys before."""
    kept: dict[str, str] = {}
    for override in overrides:
        key = override_key(override)
        kept = {name: text for name, text in kept.items() if name != key and not name.startswith(f"{key}.")}
        kept[key] = override
    return list(kept.values())


def compose_config(overrides: Sequence[str]) -> RunConfig:
    """As the launcher composes one; raises UserError."""
    refuse_parts(overrides)
    try:
        composed = compose("config", list(overrides))
        refuse_added_keys(composed)
        return cast(RunConfig, OmegaConf.to_object(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def _start(said: StageConfig, before: Sequence[Stage]) -> Stage | None:
    if said.init_from == MODEL or not before:
        return None
    if said.init_from is None:
        return before[-1]
    return next(stage for stage in before if stage.name == said.init_from)


def _start_overrides(start: Stage | None) -> list[str]:
    return [] if start is None else ["model=local", f"model.source={quoted(str(start.result))}", "model.adapter=null"]


def _refuse_overrides(said: StageConfig, start: Stage | None) -> None:
    for override in said.overrides:
        key = override_key(override)
        if key.partition(".")[0] in ("hydra", "dry_run"):
            raise UserError(f"{override} is for the whole command; remove it from the stage")
        if start is not None and key in (MODEL, "model.source", "model.adapter"):
            raise UserError(
                f"{override}: the stage starts from {start.name}; remove it, or write init_from: {MODEL} for the "
                "model given"
            )


def _plan(config: RunConfig, start: Stage | None, folder: RunFolder) -> Plan:
    """Of a stage whose model is not there yet, with the model its chain begins with: of the same architecture and
    tokenizer."""
    if not isinstance(config.task, TrainingConfig):
        raise UserError("a stage trains: task=pretrain or task=finetune")
    if not isinstance(config.cluster, LocalConfig):
        raise UserError("a chain runs on one machine, with cluster=local; a cluster takes single runs and sweeps")
    while start is not None:
        config = replace(config, model=start.config.model)
        start = start.start
    return make_plan(config, run_date=previous_template_date([folder.config]))
