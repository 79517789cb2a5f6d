"""The connection of a run to W&B, whose failures neither stop nor delay the training."""

from __future__ import annotations

import os
import queue
import re
import shlex
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from qwen_cl.config.wandb import LogAdapter
from qwen_cl.reporting.tracking.artifacts import log_adapter
from qwen_cl.reporting.tracking.metrics import define
from qwen_cl.runs.folder import RunFolder

FINISH_TIMEOUT = 30.0
"""Seconds to wait for uploads after training; the records are on disk too. WANDB_FINISH_TIMEOUT overrides it."""
FATAL = re.compile(r"failed to upload: \d+ [A-Z][\w ]*?(?= url=)")
"""The message with which W&B's client gives up on a run's records."""
QUEUED = 10_000
"""The number of calls that may wait for W&B; later ones are dropped."""


def finish_timeout() -> float:
    """Return the seconds to wait for uploads after training."""
    return float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT))


class WandbLogger:
    """A W&B run that is called from a thread of its own, as W&B's service can hang, for example with its disk."""

    def __init__(self, run: Any, folder: RunFolder) -> None:
        """Log to W&B's ``run``; failures are recorded in the status of ``folder``."""
        self.folder = folder
        self._run = run
        self._defined: set[str] = set()
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUED)
        self._failed: str | None = None
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any], step: int) -> None:
        """Log metrics. ``record`` has the tokens trained on as ``tokens``, the x axis; ``step`` is the optimizer's."""
        self._put(lambda: self._log(dict(record), step))

    def log_table(self, name: str, columns: list[str], rows: list[list[str]], step: int) -> None:
        """Log a table."""
        self._put(lambda: self._log_table(name, columns, rows, step))

    def log_adapter(self, mode: LogAdapter) -> None:
        """Log the trained adapter as an artifact."""
        self._put(lambda: log_adapter(self._run, self.folder, mode))

    def finish(self, exit_code: int) -> None:
        """Finish the W&B run; return soon after the timeout even if W&B hangs."""
        self._put(lambda: self._run.finish(exit_code=exit_code))
        self._put(None)
        self._thread.join(finish_timeout() + 10)
        if self._thread.is_alive():
            self._failed = f"its service did not end within {finish_timeout() + 10:.0f} s"
        else:
            self._failed = self._refusal() or self._failed  # the cause of a timeout, if the client logged it
        if self._failed is not None:
            self._record_failure(self._failed)
            _kill_service()

    def _put(self, call: Callable[[], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._failed = f"{QUEUED} records wait for its service, later ones are dropped"

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # W&B raises errors of its own, of asyncio and of the system
                if self._failed is None:  # printed once
                    print(f"W&B failed: {one_line(error)}", flush=True)
                self._failed = one_line(error)

    def _log(self, record: dict[str, Any], step: int) -> None:
        for name in record.keys() - self._defined:
            define(self._run, name)
        self._defined |= record.keys()
        self._run.log(record, step=step)

    def _log_table(self, name: str, columns: list[str], rows: list[list[str]], step: int) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=columns, data=rows)}, step=step)

    def _refusal(self) -> str | None:
        """Return the reason why the server refuses records, as of a revoked key, which only the client's log has."""
        log = Path(self._run.dir).parent / "logs" / "debug-internal.log"
        if log.is_file() and (line := FATAL.search(log.read_text(encoding="utf-8", errors="replace"))):
            return line[0]
        return None

    def _record_failure(self, reason: str) -> None:
        record = self.folder.status().wandb
        include = "--include-online " if record.mode == "online" else ""
        sync = f"wandb sync {include}{shlex.quote(str(record.directory))}"
        self.folder.update_status(wandb=replace(record, reason=reason, sync=sync))


def one_line(error: BaseException) -> str:
    """Return the error's class and the start of its message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _kill_service() -> None:
    """Kill W&B's service: its exit hook in this process would wait for a service that no longer answers."""
    for child in psutil.Process().children(recursive=True):
        try:
            if child.name().startswith("wandb-"):
                child.kill()
        except psutil.Error:
            continue
