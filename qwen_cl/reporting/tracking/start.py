"""Start W&B for a run: online where it can be, offline where it cannot, and said which."""

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
from qwen_cl.reporting.tracking.connection import Dashboard, finish_timeout, one_line
from qwen_cl.reporting.tracking.identity import WandbIdentity, identify
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import WandbRecord

INIT_TIMEOUT = 30.0
"""Seconds to wait for a server that answers but does not start the run, before going on without it."""
CONNECT_TIMEOUT = 5
"""Seconds to wait for a server to answer at all."""


@contextmanager
def dashboard_of(config: RunConfig, folder: RunFolder) -> Iterator[Dashboard | None]:
    """What the run logs to while it lasts; None where there is none. Raises nothing of W&B's."""
    dashboard = start_dashboard(config, folder)
    try:
        yield dashboard
    except BaseException:
        if dashboard is not None:
            dashboard.finish(exit_code=1)
        raise
    if dashboard is not None:
        dashboard.finish(exit_code=0)


def start_dashboard(config: RunConfig, folder: RunFolder) -> Dashboard | None:
    """Records mode, place and reason in the run's status, whatever comes of it."""
    if config.wandb.mode is WandbMode.disabled:
        folder.update_status(wandb=WandbRecord(mode=WandbMode.disabled.value))
        return None
    without_fault_reports()
    identity = identify(config, folder)
    try:
        started, reason = _online(config, identity) if config.wandb.mode is WandbMode.online else (None, None)
        mode = WandbMode.offline if started is None else WandbMode.online
        started = started or _init(config, identity, WandbMode.offline)
    except Exception as error:  # a full disk, a folder that cannot be written to, a service that does not start
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
    return Dashboard(started, folder)


def without_fault_reports() -> None:
    """W&B sends its own faults to its makers, and a process waits for that at its end where the server hangs."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _online(config: RunConfig, identity: WandbIdentity) -> tuple[Any, str | None]:
    """The run, or None and why not."""
    import wandb

    if reason := _why_offline(wandb):
        return None, reason
    there = set(identity.directory.glob("wandb/run-*"))
    if identity.rewind_to is not None:
        with suppress(Exception):  # a server that does not know how: what it has of later steps stays, and is the same
            return _init(config, identity, WandbMode.online, rewind=True), None
        wandb.teardown()
    try:
        return _init(config, identity, WandbMode.online), None
    except Exception as error:  # W&B's own errors have no common class, and those of its service are asyncio's
        wandb.teardown()  # its service still holds the id of the run that did not start
        for abandoned in set(identity.directory.glob(f"wandb/run-*-{identity.id}")) - there:
            shutil.rmtree(abandoned, ignore_errors=True)
        return None, one_line(error)


def _why_offline(wandb: Any) -> str | None:
    """What can be known without waiting for W&B's own retries."""
    if not _has_key(wandb):
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


def _has_key(wandb: Any) -> bool:
    """A malformed one is none."""
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError, ValueError):
        return False


def _init(config: RunConfig, identity: WandbIdentity, mode: WandbMode, *, rewind: bool = False) -> Any:
    """A run that goes on drops what it logged after its checkpoint (``rewind``), or logs the same values again."""
    import wandb

    going_on: dict[str, Any] = {"resume": "allow"}
    if rewind:
        going_on = {"resume_from": f"{identity.id}?_step={identity.rewind_to}"}
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        id=identity.id,
        name=identity.name,
        group=identity.group,
        job_type=identity.job_type,
        tags=identity.tags,
        **going_on,
        config=identity.config,
        dir=str(identity.directory),
        mode=mode.value,
        settings=wandb.Settings(
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)),
            finish_timeout=finish_timeout(),
            finish_timeout_raises=True,
            console="off",
            # The facts have the commit; a remote's URL may hold a password, a patch whatever the code does.
            disable_git=True,
            disable_code=True,
        ),
    )
