"""The state of a stage: finished with the present settings, or interrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.config.resume import AutoResumeConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import leaves_to_compare, read_plain, save_config, to_plain
from qwen_cl.continual.stages import Stage
from qwen_cl.runs.status import State

RECORD = "stage.yaml"


def is_finished(stage: Stage) -> bool:
    """Return True if the stage completed with its present config and data.

    Raises:
        UserError: it completed with others, which the message names.
    """
    status = stage.folder.status()
    if status.state is not State.COMPLETED:
        return False
    record = read_plain(stage.folder.directory / RECORD)
    then, now = leaves_to_compare(record), leaves_to_compare(to_plain(_resolved(stage)))
    differing = [
        f"{key} ({_format(then, key)} then, {_format(now, key)} now)"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if status.data_sha256 != stage.plan.content():
        differing.append("the content of its data")
    if differing:
        raise UserError(
            f"stage {stage.name} completed with other settings: {', '.join(differing[:4])}; use the earlier values, "
            f"choose another hydra.run.dir, or rename {stage.folder.directory} to run it, and the stages that start "
            "from it, again"
        )
    return True


def record_stage(stage: Stage) -> None:
    """Write the config that the stage is about to run with."""
    stage.folder.directory.mkdir(parents=True, exist_ok=True)
    save_config(_resolved(stage), stage.folder.directory / RECORD)


def archive(stage: Stage) -> None:
    """Rename the folder of an interrupted stage that is not resumed; nothing is deleted.

    Raises:
        UserError: the stage is still running.
    """
    if isinstance(stage.config.resume, AutoResumeConfig) and stage.folder.status().state is not State.COMPLETED:
        return
    if archived := stage.folder.archive():
        print(f"the earlier folder of stage {stage.name} was renamed to {archived}")


def _resolved(stage: Stage) -> RunConfig:
    """Return the config with its data settings resolved; the others are compared as the user wrote them."""
    return replace(stage.config, data=stage.plan.config.data)


def _format(leaves: dict[str, Any], key: str) -> str:
    return str(leaves[key]) if key in leaves else "absent"
