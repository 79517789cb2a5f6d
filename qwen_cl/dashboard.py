"""Weights & Biases: online where it can be, offline where it cannot, and said which."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from qwen_cl.config.file import to_plain
from qwen_cl.config.schema import RunConfig, WandbMode
from qwen_cl.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

INIT_TIMEOUT = 30
"""Seconds to wait for a server that answers but does not start the run, before going on without it."""
CONNECT_TIMEOUT = 5
"""Seconds to wait for a server to answer at all."""


def start_dashboard(config: RunConfig, folder: RunFolder) -> WandbLogger | None:
    """A logger with a started run behind it; records mode and reason in the run's status."""
    if config.wandb.mode is WandbMode.disabled:
        folder.update_status(wandb={"mode": WandbMode.disabled.value})
        return None
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    mode, reason = config.wandb.mode, None
    if mode is WandbMode.online and (reason := _why_offline(wandb)):
        mode = WandbMode.offline
    try:
        started = _init(config, folder, mode)
    except (wandb.errors.CommError, wandb.errors.UsageError, wandb.errors.AuthenticationError, OSError) as error:
        if mode is WandbMode.offline:
            raise
        mode, reason = WandbMode.offline, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        wandb.teardown()  # its service still holds the id of the run that did not start
        for abandoned in folder.wandb.glob("run-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        started = _init(config, folder, mode)
    status: dict[str, Any] = {"mode": mode.value, "reason": reason, "id": started.id}
    if mode is WandbMode.offline:
        status["sync"] = f"wandb sync {Path(started.dir).parent}"
    else:
        status["url"] = started.url
    folder.update_status(wandb=status)
    return WandbLogger(save_dir=str(folder.directory), log_model=False)


def _why_offline(wandb: Any) -> str | None:
    """What can be known without waiting for W&B's own retries."""
    if not wandb.api.api_key:
        return "no API key"
    server = urlsplit(wandb.setup().settings.base_url)
    if getproxies().get(server.scheme):
        return None  # the proxy finds the server, not this machine
    try:
        port = server.port or (443 if server.scheme == "https" else 80)
        socket.create_connection((server.hostname, port), timeout=CONNECT_TIMEOUT).close()
    except OSError as error:
        return f"{server.netloc} does not answer ({error.strerror or error})"
    return None


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
        settings=wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)), console="off"),
    )


def run_id(folder: RunFolder) -> str:
    """Stable for a folder, so that a resumed run goes on in the same curve."""
    kept = [character if character.isalnum() else "-" for character in "-".join(folder.directory.parts[-2:])]
    return "".join(kept)[-60:].strip("-")
