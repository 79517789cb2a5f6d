"""Which stages are done, with what, and what becomes of those that were cut off."""

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
    """Completed, with the config and the data that the stage has now.

    Raises:
        UserError: completed with others; says which.
    """
    status = stage.folder.status()
    if status.state is not State.COMPLETED:
        return False
    record = read_plain(stage.folder.directory / RECORD)
    then, now = leaves_to_compare(record), leaves_to_compare(to_plain(_settled(stage)))
    differing = [
        f"{key} ({_shown(then, key)} then, {_shown(now, key)} now)"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if status.data_sha256 != stage.plan.content():
        differing.append("the content of its data")
    if differing:
        raise UserError(
            f"stage {stage.name} was completed with something else: {', '.join(differing[:4])}; say it as then, choose "
            f"another hydra.run.dir, or move {stage.folder.directory} away to run it, and what starts from it, again"
        )
    return True


def remember(stage: Stage) -> None:
    """Before it starts: what it is run with."""
    stage.folder.directory.mkdir(parents=True, exist_ok=True)
    save_config(_settled(stage), stage.folder.directory / RECORD)


def archive(stage: Stage) -> None:
    """Of a stage that was cut off and is not to be gone on with; nothing of it is deleted.

    Raises:
        UserError: it is still running.
    """
    if isinstance(stage.config.resume, AutoResumeConfig) and stage.folder.status().state is not State.COMPLETED:
        return
    if aside := stage.folder.archive():
        print(f"what there was of stage {stage.name} is in {aside}")


def _settled(stage: Stage) -> RunConfig:
    """As it was said, but of its data what has an effect on them."""
    return replace(stage.config, data=stage.plan.config.data)


def _shown(leaves: dict[str, Any], key: str) -> str:
    return str(leaves[key]) if key in leaves else "not there"
