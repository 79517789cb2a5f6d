"""A run that trained, found again by its folder. No torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from qwen_cl.config.errors import UserError
from qwen_cl.config.file import load_config
from qwen_cl.config.schema import RunConfig
from qwen_cl.config.tasks import ExportConfig, TrainingConfig
from qwen_cl.run_folder import RunFolder

CHECKPOINT = re.compile(r"step=(\d+)")


@dataclass(frozen=True, slots=True)
class Run:
    """A run as its folder tells it."""

    folder: RunFolder
    config: RunConfig
    status: dict[str, Any]
    step: int
    weights: Path
    """The distributed checkpoint of that step."""


def find_run(task: ExportConfig) -> Run:
    """Raises UserError where ``task.run`` is no run's folder, or has no such checkpoint that is whole."""
    folder = RunFolder(os.path.expanduser(task.run))  # noqa: PTH111 - Path's raises on an unknown user
    if not folder.config.is_file():
        raise UserError(f"task.run ({folder.directory}) is not the folder of a run: it has no config.yaml")
    config = _run_config(folder)
    whole = {
        int(match[1]): path / "weights"
        for path in folder.checkpoints.glob("step=*")
        if (match := CHECKPOINT.fullmatch(path.name)) and not _is_unfinished(path)
    }
    if not whole:
        raise UserError(f"task.run ({folder.directory}) has no whole checkpoint in checkpoints/ to export")
    step = max(whole) if task.step is None else task.step
    if step not in whole:
        there = ", ".join(map(str, sorted(whole)))
        raise UserError(f"task.step ({task.step}) has no whole checkpoint in {folder.checkpoints}; there are {there}")
    return Run(folder, config, _status(folder), step, whole[step])


def _run_config(folder: RunFolder) -> RunConfig:
    import yaml

    try:
        config = load_config(folder.config)
    except (OmegaConfBaseException, UserError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder.config} is not a run's config, or of another version: {reason}") from error
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder.config} is not a run's config: {error!r}") from error
    if not isinstance(config.task, TrainingConfig):
        raise UserError(f"{folder.config} is of no run that trains")
    return config


def _status(folder: RunFolder) -> dict[str, Any]:
    try:
        return folder.status()
    except ValueError as error:
        raise UserError(f"{folder.status_file} is not JSON: {error}") from error


def _is_unfinished(checkpoint: Path) -> bool:
    """NeMo puts a file of this name beside a checkpoint for as long as it is being written."""
    return checkpoint.with_name(f"{checkpoint.name}-unfinished").exists()
