"""The start of a W&B run: online if the server can be reached, and otherwise offline."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from qwen_cl.config.run import RunConfig
from qwen_cl.config.wandb import WandbMode
from qwen_cl.reporting.tracking.connection import WandbLogger, finish_timeout, one_line
from qwen_cl.reporting.tracking.identity import WandbIdentity, identify
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import WandbRecord

INIT_TIMEOUT = 30.0
"""Seconds to wait for a server that accepts connections to start the run, before logging offline."""
CONNECT_TIMEOUT = 5
"""Seconds to wait for a connection to the server."""


@contextmanager
def wandb_logger(config: RunConfig, folder: RunFolder) -> Iterator[WandbLogger | None]:
    """Start a W&B run, and finish it at the end; None if W&B is disabled or does not start.

    W&B's errors are not raised.
    """
    logger = start_wandb(config, folder)
    try:
        yield logger
    except BaseException:
        if logger is not None:
            logger.finish(exit_code=1)
        raise
    if logger is not None:
        logger.finish(exit_code=0)


def start_wandb(config: RunConfig, folder: RunFolder) -> WandbLogger | None:
    """Start a W&B run; record its mode, folder, address and any reason for logging offline in the run's status."""
    if config.wandb.mode is WandbMode.disabled:
        folder.update_status(wandb=WandbRecord(mode=WandbMode.disabled.value))
        return None
    without_fault_reports()
    identity = identify(config, folder)
    try:
        started, reason = _online(config, identity) if config.wandb.mode is WandbMode.online else (None, None)
        mode = WandbMode.offline if started is None else WandbMode.online
        started = started or _init(config, identity, WandbMode.offline)
    except Exception as error:  # as of a full disk, a read-only folder, or a service that does not start
        record = WandbRecord(mode=WandbMode.disabled.value, reason=one_line(error), id=identity.id)
        folder.update_status(wandb=record)
        return None
    place = Path(started.dir).parent
    offline = mode is WandbMode.offline
    record = WandbRecord(
        mode=mode.value,
        reason=reason,
        id=started.id,
        directory=str(place),
        url=None if offline else started.url,
        sync=f"wandb sync {shlex.quote(str(place))}" if offline else None,
    )
    folder.update_status(wandb=record)
    return WandbLogger(started, folder)


def without_fault_reports() -> None:
    """Disable W&B's error reports to its developers, for which a process waits at its end if the server hangs."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _online(config: RunConfig, identity: WandbIdentity) -> tuple[Any, str | None]:
    """Start the run online; return None and the reason if that fails."""
    import wandb

    if reason := _why_offline(wandb):
        return None, reason
    existing = set(identity.directory.glob("wandb/run-*"))
    if identity.rewind_to is not None:
        with suppress(Exception):  # a server without rewind keeps its later steps, which have the same values
            return _init(config, identity, WandbMode.online, rewind=True), None
        wandb.teardown()
    try:
        return _init(config, identity, WandbMode.online), None
    except Exception as error:  # W&B's errors have no common class, and those of its service are of asyncio
        wandb.teardown()  # its service still holds the id of the run that did not start
        for abandoned in set(identity.directory.glob(f"wandb/run-*-{identity.id}")) - existing:
            shutil.rmtree(abandoned, ignore_errors=True)
        return None, one_line(error)


def _why_offline(wandb: Any) -> str | None:
    """Return a reason to log offline that is known without waiting for W&B's retries, or None."""
    if not _has_key(wandb):
        return "no API key"
    server = urlsplit(wandb.setup().settings.base_url)
    if getproxies().get(server.scheme):
        return None  # the proxy connects to the server, not this machine
    try:
        port = server.port or (443 if server.scheme == "https" else 80)
        socket.create_connection((server.hostname, port), timeout=CONNECT_TIMEOUT).close()
    except OSError as error:
        return f"{server.netloc} does not answer ({error.strerror or error})"
    return None


def _has_key(wandb: Any) -> bool:
    """Return True if W&B has an API key that is well-formed."""
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError, ValueError):
        return False


def _init(config: RunConfig, identity: WandbIdentity, mode: WandbMode, *, rewind: bool = False) -> Any:
    """Start the run in W&B. With ``rewind`` a resumed run drops the steps after its checkpoint first."""
    import wandb

    resume: dict[str, Any] = {"resume": "allow"}
    if rewind:
        resume = {"resume_from": f"{identity.id}?_step={identity.rewind_to}"}
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        id=identity.id,
        name=identity.name,
        group=identity.group,
        job_type=identity.job_type,
        tags=identity.tags,
        **resume,
        config=identity.config,
        dir=str(identity.directory),
        mode=mode.value,
        settings=wandb.Settings(
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)),
            finish_timeout=finish_timeout(),
            finish_timeout_raises=True,
            console="off",
            # The facts have the commit; a remote's URL may contain a password, and a patch may contain secrets.
            disable_git=True,
            disable_code=True,
        ),
    )
