"""The folder of a run: its files, its locks, and its status. No torch."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qwen_cl.config.errors import UserError
from qwen_cl.files.atomic import atomic_write, flush
from qwen_cl.files.names import MODEL_FILES
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.status import RunStatus, State, changed, now, parse_status

ARCHIVED = ".cut-off-"
"""Part of an archived folder's name. Unchanged from earlier versions, so that their folders are recognized."""
RESERVE_BYTES = 2**16
LAUNCHER_LOCK, WORKER_LOCK, STATUS_LOCK = ".lock", ".worker.lock", ".status.lock"
STATUS_LOCK_SECONDS = 10.0
"""Longer than any update takes. A process that is stopped during an update (SIGSTOP) must not block the others."""


class RunFolder:
    """The paths and records of one run. ``status.json`` is the single source of truth about its state."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self.config = self.directory / "config.yaml"
        self.reserve = self.directory / ".reserve"
        self.status_file = self.directory / "status.json"
        self.metrics_file = self.directory / "metrics.jsonl"
        self.log = self.directory / "run.log"
        self.checkpoints = self.directory / "checkpoints"
        self.tokenizer = self.directory / "tokenizer"
        self.model_files = self.directory / MODEL_FILES
        self.adapter = self.directory / "adapter"
        self.text_target = self.directory / "text_target.json"
        self.moved_rows = self.directory / "moved_rows.json"
        self.report = self.directory / "report.png"
        self.samples = self.directory / "samples.jsonl"
        self.data_report = self.directory / "data_report.txt"
        self.data_report_json = self.directory / "data_report.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against other runs. The system releases the lock when this process dies.

        Raises:
            UserError: another run is using it.
        """
        with self._held(LAUNCHER_LOCK, "in use by another run"):
            with self.worker_lock():  # a worker may outlive its launcher
                pass
            yield

    @contextmanager
    def worker_lock(self) -> Iterator[None]:
        """Hold the lock of the run's first process for as long as it may write, even if the launcher is gone.

        Raises:
            UserError: another process holds it.
        """
        with self._held(WORKER_LOCK, "still written to by a run whose launcher is gone"):
            yield

    @contextmanager
    def _held(self, name: str, otherwise: str) -> Iterator[None]:
        lock = FileLock(self.directory / name)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"hydra.run.dir ({self.directory}) is {otherwise}; choose another folder, or wait for it"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def archive(self) -> Path | None:
        """Rename the folder of an interrupted run before the run starts again, and return its new path, if it exists.

        Raises:
            UserError: the run is still running.
        """
        if not self.directory.exists():
            return None
        with self.lock():
            pass
        number = 1
        while (archived := self.directory.with_name(f"{self.directory.name}{ARCHIVED}{number}")).exists():
            number += 1
        return self.directory.rename(archived)

    def status(self) -> RunStatus:
        """Return what the run last recorded about itself; all defaults before the first record.

        Raises:
            UserError: status.json is damaged.
        """
        return self._read_status()[1]

    def update_status(self, **changes: Any) -> None:
        """Change fields of status.json.

        A reader sees the old file or the new one, even if this process dies in between. Of two processes that change it
        at once, neither overwrites what the other wrote.

        Raises:
            UserError: status.json is damaged.
        """
        self._change_status(changes)

    def mark_running(self, **changes: Any) -> None:
        """Record that the run starts or resumes, and clear how it ended before."""
        ended = {"reason": None, "failure_kind": None, "retriable": None, "end": None}
        self._change_status({"state": State.RUNNING, **ended, **changes})

    def finish(self, state: State, reason: str | None = None, kind: FailureKind | None = None, **changes: Any) -> None:
        """Record the final status, unless there is one. The first one counts: later failures follow from it."""
        final = {"state": state, "reason": reason, "failure_kind": kind, "end": now()}
        self._change_status({**final, **changes}, only_open=True)

    def _read_status(self) -> tuple[dict[str, Any], RunStatus]:
        """Return the JSON of status.json, as read and as a typed status."""
        try:
            record = json.loads(self.status_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}, RunStatus()
        except ValueError as error:
            raise UserError(f"{self.status_file} is not JSON: {error}") from error
        try:
            return record, parse_status(record)
        except ValueError as error:
            raise UserError(f"{self.status_file}: {error}; correct it, or choose another folder") from error

    def _change_status(self, changes: dict[str, Any], *, only_open: bool = False) -> None:
        try:
            self._rewrite_status(changes, only_open)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.reserve.unlink(missing_ok=True)  # a full disk must not keep the final status from being written
            self._rewrite_status(changes, only_open)

    def _rewrite_status(self, changes: dict[str, Any], only_open: bool) -> None:
        with self._status_lock():
            record, status = self._read_status()
            if only_open and not status.is_open:
                return
            after = json.dumps(changed(record, changes), indent=2, ensure_ascii=False, default=datetime.isoformat)
            with atomic_write(self.status_file) as temporary:
                temporary.write_text(f"{after}\n", encoding="utf-8")
                flush(temporary)

    @contextmanager
    def _status_lock(self) -> Iterator[None]:
        """Hold the right to change status.json. No other lock is taken while holding it."""
        lock = FileLock(self.directory / STATUS_LOCK)
        with suppress(Timeout):
            lock.acquire(timeout=STATUS_LOCK_SECONDS, poll_interval=0.01)
        try:
            yield
        finally:
            lock.release()

    def reserve_disk_space(self) -> None:
        """Reserve disk space, so that a run can record its final status on a full disk."""
        with suppress(OSError):
            self.reserve.write_bytes(os.urandom(RESERVE_BYTES))

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def remove_if_empty(directory: Path) -> None:
    """Remove the folder of a refused run, with the parents that Hydra created for it before the checks."""
    with suppress(FileNotFoundError):
        locks = (LAUNCHER_LOCK, WORKER_LOCK, STATUS_LOCK)
        if {path.name for path in directory.iterdir()} <= set(locks):
            for name in locks:
                (directory / name).unlink(missing_ok=True)
    made = [directory, *(parent for parent in directory.parents if Path.cwd() in parent.parents)]
    for candidate in made:
        try:
            candidate.rmdir()
        except OSError:
            return
