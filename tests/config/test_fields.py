"""The metadata of each config field agrees with what resuming a run does with its key."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Affects, Scope, affects, key_fields, keys_of
from qwen_cl.config.resume import AutoResumeConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import save_config
from qwen_cl.config.store import GROUPS
from qwen_cl.config.task.training import TrainingConfig
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.resume import FACTS, resume
from tests.config.test_compose import BESIDE, GROUP_CHOICES, choice_name
from tests.support.composed_configs import compose_run

Change = tuple[str, RunConfig, RunConfig]
"""A key, and a config without and with another value of it."""


def changes_of_fields() -> Iterator[Change]:
    """Yield a change of each field of each choice that a run can have."""
    seen = set()
    for path in GROUP_CHOICES:
        config = compose_run(choice_name(path), *BESIDE.get(choice_name(path), []))
        owners: list[tuple[str, Any]] = [(path.parent.name, getattr(config, path.parent.name)), ("wandb", config.wandb)]
        owners += [("", config)]
        for name, owner in owners if isinstance(config.task, TrainingConfig) else []:
            for field in fields(owner):
                key = f"{name}.{field.name}".lstrip(".")
                if key not in seen and not is_dataclass(getattr(owner, field.name)):
                    seen.add(key)
                    yield key, config, with_value(config, key, another(getattr(owner, field.name), field.type))


def changes_of_choices() -> Iterator[Change]:
    """Another choice of every group whose choices differ in kind."""
    for other in ["task=pretrain", "peft=none", "data=mock", "replay=demo", "resume=auto", "cluster=slurm"]:
        group = other.partition("=")[0]
        before = compose_run(*(["resume=never"] if group == "resume" else []))
        yield f"{group}.type", before, with_value(before, group, getattr(compose_run(other), group))


def with_value(config: RunConfig, key: str, value: Any) -> RunConfig:
    """A copy with another value, which no rule has looked at: most values of one key need some of another."""
    group, _, name = key.rpartition(".")
    changed = copy(config)
    if group:
        setattr(changed, group, copy(getattr(config, group)))
    setattr(getattr(changed, group) if group else changed, name, value)
    return changed


def another(value: Any, kind: Any) -> Any:
    if value is None and kind == "int | None":
        return 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(each for each in type(value) if each is not value)
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, "other"]
    if isinstance(value, dict):
        return {**value, "other": 1.0 if kind == "dict[str, float]" else "other"}
    return f"{value or ''}other"


def refused(folder: RunFolder, config: RunConfig, allow: list[str]) -> str:
    """Return the error of resuming, or an empty string."""
    facts = dict.fromkeys(FACTS)
    asked = copy(config)
    asked.resume = AutoResumeConfig(allow_changes=allow)
    try:
        resume(folder, asked, facts)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("changes", [pytest.param(changes_of_fields, marks=pytest.mark.slow), changes_of_choices])
def test_a_key_may_change_when_a_run_resumes_as_its_field_says(changes: Any, tmp_path: Path) -> None:
    found = list(changes())
    assert {affects(key) for key, _, _ in found} == set(Affects)
    folders: dict[int, RunFolder] = {}
    for key, before, after in found:
        if id(before) not in folders:
            folder = folders[id(before)] = RunFolder(tmp_path / str(len(folders)))
            folder.directory.mkdir()
            save_config(before, folder.config)
            folder.mark_running(phase="training")
            assert not refused(folder, before, [])
        folder, of = folders[id(before)], affects(key)
        message = refused(folder, after, [])
        assert (message == "") == (of in (Affects.nothing, Affects.execution)), key
        if message:
            assert f" {key} was " in message or f" {key}.other was " in message  # of a mapping each entry
            allowed = refused(folder, after, [key.partition(".")[0]])
            assert (allowed == "") == (of is Affects.result), key


def test_every_key_is_one_thing_in_every_choice_that_has_it() -> None:
    for group, kinds in GROUPS.items():
        for kind in kinds.values():
            for field in fields(kind):
                key = f"{group}.{field.name}"
                assert field.metadata == key_fields()[key].metadata, f"{kind.__name__}.{field.name}"


def test_a_run_that_resumes_may_have_these_keys_changed() -> None:
    """Check what the README promises for every task, method, and dataset."""
    allowed = {"name", "dry_run", "task.max_time", "task.micro_batch_size", "task.keep_last", "model.verify"}
    assert all(affects(key) in (Affects.nothing, Affects.execution) for key in allowed)
    assert all(affects(f"cluster.{name}") is Affects.execution for name in ("type", "devices", "tensor_parallel"))
    result = ("lr", "seed", "task.global_batch_size", "task.sequence_length", "data.path", "cluster.precision")
    assert all(affects(key) is Affects.result for key in result)
    assert all(affects(f"peft.{name}") is Affects.checkpoint for name in ("type", "rank", "target_modules"))
    assert affects("data.fields.prompt") is affects("data.fields")
    assert affects("model.of_tomorrow") is Affects.result


def test_commands_on_a_finished_run_take_no_key_that_its_result_depends_on() -> None:
    assert all(affects(key) is Affects.nothing for key in keys_of(Scope.access))
