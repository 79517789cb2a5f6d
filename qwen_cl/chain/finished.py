"""Which stages are done, with what, and what becomes of those that were cut off."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import OmegaConf

from qwen_cl.chain.stages import Stage
from qwen_cl.config.data import TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.file import save_config, to_plain
from qwen_cl.data.corpus.target import text_content
from qwen_cl.plan import data_hash
from qwen_cl.run_folder import State

RECORD = "stage.yaml"
OF_NO_CONSEQUENCE = ("wandb.", "dry_run", "model.endpoint", "model.offline", "model.cache")


def is_finished(stage: Stage) -> bool:
    """Completed, with the config and the data that the stage has now.

    Raises:
        UserError: completed with others; says which.
    """
    status = stage.folder.status()
    if status.get("state") != State.COMPLETED:
        return False
    then = _leaves(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(stage.folder.directory / RECORD))))
    now = _leaves(to_plain(stage.config))
    differing = [
        f"{key} ({_shown(then, key)} then, {_shown(now, key)} now)"
        for key in sorted(then.keys() | now.keys())
        if not key.startswith(OF_NO_CONSEQUENCE) and then.get(key) != now.get(key)
    ]
    if status.get("data_hash") != _data_hash(stage):
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
    save_config(stage.config, stage.folder.directory / RECORD)


def move_aside(stage: Stage) -> None:
    """Nothing of a stage that was cut off is deleted.

    Raises:
        UserError: it is still running.
    """
    directory = stage.folder.directory
    if not directory.exists():
        return
    with stage.folder.lock():
        pass
    number = 1
    while (aside := directory.with_name(f"{directory.name}.cut-off-{number}")).exists():
        number += 1
    directory.rename(aside)
    print(f"what there was of stage {stage.name} is in {aside}")


def _data_hash(stage: Stage) -> str | None:
    """A plan knows nothing of raw text before it is tokenised."""
    data = stage.config.data
    if isinstance(data, TextDataConfig):
        return data_hash(text_content(data), stage.plan.config)
    return stage.plan.data_hash


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {name: leaf for part in value for name, leaf in _leaves(value[part], f"{key}.{part}".lstrip(".")).items()}


def _shown(leaves: dict[str, Any], key: str) -> str:
    return str(leaves[key]) if key in leaves else "not there"
