"""Weights & Biases: online where it can be, offline where it cannot, and said which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.file import to_plain
from qwen_cl.config.schema import RunConfig, WandbMode
from qwen_cl.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

INIT_TIMEOUT = 30
"""Seconds to wait for the server before going on without it."""


def start_dashboard(config: RunConfig, folder: RunFolder) -> WandbLogger | None:
    """A logger with a started run behind it; records mode and reason in the run's status."""
    if config.wandb.mode is WandbMode.disabled:
        folder.update_status(wandb={"mode": WandbMode.disabled.value})
        return None
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    mode, reason = config.wandb.mode, None
    if mode is WandbMode.online and not wandb.api.api_key:
        mode, reason = WandbMode.offline, "no API key"
    try:
        started = _init(config, folder, mode)
    except (wandb.errors.CommError, wandb.errors.UsageError, wandb.errors.AuthenticationError, OSError) as error:
        if mode is WandbMode.offline:
            raise
        mode, reason = WandbMode.offline, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        started = _init(config, folder, mode)
    status: dict[str, Any] = {"mode": mode.value, "reason": reason, "id": started.id}
    if mode is WandbMode.offline:
        status["sync"] = f"wandb sync {Path(started.dir).parent}"
    else:
        status["url"] = started.url
    folder.update_status(wandb=status)
    return WandbLogger(save_dir=str(folder.directory), log_model=False)


def _init(config: RunConfig, folder: RunFolder, mode: WandbMode) -> Any:
    import wandb

    facts = {name: folder.status().get(name) for name in ("model_commit", "data_hash", "git_commit", "versions")}
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.name or folder.directory.parent.name,
        id=run_id(folder),
        resume="allow",
        tags=config.wandb.tags,
        config={**to_plain(config), "facts": facts},
        dir=str(folder.directory),
        mode=mode.value,
        settings=wandb.Settings(init_timeout=INIT_TIMEOUT, console="off"),
    )


def run_id(folder: RunFolder) -> str:
    """Stable for a folder, so that a resumed run goes on in the same curve."""
    kept = [character if character.isalnum() else "-" for character in "-".join(folder.directory.parts[-2:])]
    return "".join(kept)[-60:].strip("-")
