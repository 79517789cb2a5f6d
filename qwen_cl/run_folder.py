"""The folder of a run: what is in it, who may write to it, and what it says of itself. No torch."""

from __future__ import annotations

import enum
import errno
import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qwen_cl.config.errors import UserError
from qwen_cl.durable import flush, replacing

CUT_OFF = ".cut-off-"
RESERVE_BYTES = 2**16
LAUNCHER_LOCK, WORKER_LOCK = ".lock", ".worker.lock"
VERSIONS_OF = ("qwen_cl", "torch", "nemo_toolkit", "megatron-core", "nemo_run", "transformers", "lightning", "wandb")


class State(str, enum.Enum):
    SUBMITTED = "SUBMITTED"
    """To a cluster, where it waits."""
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    PREEMPTED = "PREEMPTED"


OPEN = (State.SUBMITTED, State.RUNNING)
"""Somebody still has to say how it ended."""


class RunFolder:
    """Paths and records of one run. ``status.json`` is the one truth about how it went."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self.config = self.directory / "config.yaml"
        self.reserve = self.directory / ".reserve"
        self.status_file = self.directory / "status.json"
        self.metrics_file = self.directory / "metrics.jsonl"
        self.log = self.directory / "run.log"
        self.checkpoints = self.directory / "checkpoints"
        self.tokenizer = self.directory / "tokenizer"
        self.model_files = self.directory / "model_files"
        self.adapter = self.directory / "adapter"
        self.text_target = self.directory / "text_target.json"
        self.moved_rows = self.directory / "moved_rows.json"
        self.report = self.directory / "report.png"
        self.samples = self.directory / "samples.jsonl"
        self.data_report = self.directory / "data_report.txt"
        self.data_report_json = self.directory / "data_report.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against other runs; the system lets go of it if this process dies.

        Raises:
            UserError: another run is using it.
        """
        with self._held(LAUNCHER_LOCK, "in use by another run"):
            with self.worker_lock():  # whoever started it may be gone
                pass
            yield

    @contextmanager
    def worker_lock(self) -> Iterator[None]:
        """What a run's first process holds for as long as it may write, whatever became of the launcher.

        Raises:
            UserError: another one holds it.
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

    def move_aside(self) -> Path | None:
        """Before a run that was cut off starts again: nothing of it is deleted. Returns where it is now.

        Raises:
            UserError: it is still running.
        """
        if not self.directory.exists():
            return None
        with self.lock():
            pass
        number = 1
        while (aside := self.directory.with_name(f"{self.directory.name}{CUT_OFF}{number}")).exists():
            number += 1
        return self.directory.rename(aside)

    def status(self) -> dict[str, Any]:
        """What the run last said of itself; empty before it said anything."""
        try:
            status: dict[str, Any] = json.loads(self.status_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return status

    def update_status(self, **changes: Any) -> None:
        """Atomic: a reader sees the old file or the new one, also if this process dies in between. Each phase is kept
        under ``began`` with the time, in seconds since 1970, at which it last began."""
        before = self.status()
        status = {**before, **changes}
        phase, known = (
            (each.get("phase") or "").partition(":")[0] for each in (status, before)
        )  # what follows counts up
        if phase != known:
            status["began"] = {**before.get("began", {}), phase: round(time.time(), 2)}
        try:
            self._write_status(status)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.reserve.unlink(missing_ok=True)  # a full disk must not have the last word
            self._write_status(status)

    def _write_status(self, status: dict[str, Any]) -> None:
        with replacing(self.status_file) as temporary:
            temporary.write_text(json.dumps(status, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            flush(temporary)

    def keep_reserve(self) -> None:
        """Room on the disk for the run to say how it ended when all else is full."""
        with suppress(OSError):
            self.reserve.write_bytes(os.urandom(RESERVE_BYTES))

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def remove_if_empty(directory: Path) -> None:
    """Hydra makes the folder, and those above it, before anything is checked; a refused run leaves none of them."""
    with suppress(FileNotFoundError):
        if {path.name for path in directory.iterdir()} <= {LAUNCHER_LOCK, WORKER_LOCK}:
            for name in (LAUNCHER_LOCK, WORKER_LOCK):
                (directory / name).unlink(missing_ok=True)
    made = [directory, *(parent for parent in directory.parents if Path.cwd() in parent.parents)]
    for candidate in made:
        try:
            candidate.rmdir()
        except OSError:
            return


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions(names: Iterable[str] = VERSIONS_OF) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_commit(directory: Path) -> str | None:
    """The commit of the code, with ``-dirty`` where files differ from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
