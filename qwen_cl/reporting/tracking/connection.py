"""A run's line to W&B. Whatever happens at the other end, training neither waits for it nor learns of it."""

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
"""Seconds to wait, once training has ended, for what is still on its way; it is on disk too. WANDB_FINISH_TIMEOUT
changes it."""
FATAL = re.compile(r"failed to upload: \d+ [A-Z][\w ]*?(?= url=)")
"""Of the line in which W&B's client gives up on a run's records."""
QUEUED = 10_000
"""Calls that may wait for W&B; those beyond are left out."""


def finish_timeout() -> float:
    return float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT))


class Dashboard:
    """Calls W&B from a thread of its own: its service can hang, for example where its disk does."""

    def __init__(self, run: Any, folder: RunFolder) -> None:
        self.folder = folder
        self._run = run
        self._defined: set[str] = set()
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUED)
        self._failed: str | None = None
        self._thread = threading.Thread(target=self._work, name="dashboard", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any], step: int) -> None:
        """``record`` has the tokens seen as ``tokens``, its x axis; ``step`` is the optimizer's."""
        self._put(lambda: self._log(dict(record), step))

    def log_table(self, name: str, columns: list[str], rows: list[list[str]], step: int) -> None:
        self._put(lambda: self._log_table(name, columns, rows, step))

    def log_adapter(self, mode: LogAdapter) -> None:
        self._put(lambda: log_adapter(self._run, self.folder, mode))

    def finish(self, exit_code: int) -> None:
        """Returns within the timeout and a little, whatever W&B does."""
        self._put(lambda: self._run.finish(exit_code=exit_code))
        self._put(None)
        self._thread.join(finish_timeout() + 10)
        if self._thread.is_alive():
            self._failed = f"its service did not end within {finish_timeout() + 10:.0f} s"
        else:
            self._failed = self._refused() or self._failed  # why it was late, where the client knows
        if self._failed is not None:
            self._record_failure(self._failed)
            _kill_service()

    def _put(self, call: Callable[[], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._failed = f"{QUEUED} records wait for its service, later ones are left out"

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # W&B raises its own, asyncio's and the system's
                if self._failed is None:  # once is enough for the log
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

    def _refused(self) -> str | None:
        """W&B's client tells nobody but its log when a server takes no more records, for example of a key that was
        withdrawn."""
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
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _kill_service() -> None:
    """Or W&B's own hook at the end of this process waits for a service that no longer answers."""
    for child in psutil.Process().children(recursive=True):
        try:
            if child.name().startswith("wandb-"):
                child.kill()
        except psutil.Error:
            continue
