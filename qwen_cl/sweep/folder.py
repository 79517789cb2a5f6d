"""A sweep's folder: one sweep at a time, and what an earlier one left there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qwen_cl.config.errors import UserError
from qwen_cl.launch.slurm.job_status import refresh, seconds_of
from qwen_cl.runs.folder import remove_if_empty
from qwen_cl.runs.status import State
from qwen_cl.sweep.outcome import is_settled, record_failure
from qwen_cl.sweep.processes import wait_for_the_end_of
from qwen_cl.sweep.trial import Trial, read_records


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Hold the folder against other sweeps; the system lets go of it if this process dies.

    Raises:
        UserError: another sweep is using it, or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"hydra.sweep.dir ({directory}) cannot be made: {error.strerror}; choose another folder"
        ) from error
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"hydra.sweep.dir ({directory}) is in use by another sweep; choose another folder, or wait for it"
        ) from error
    try:
        yield
    finally:
        lock.release()
        remove_if_empty(directory)


def wait_for_earlier_trials(directory: Path) -> None:
    """Raises UserError where one does not end."""
    for record in read_records(directory):
        wait_for_the_end_of(directory / record["name"])


def decided(trials: Sequence[Trial]) -> list[Trial]:
    """Those that an earlier sweep finished. Of the others, what died without a word gets its last one,
    and its cost is counted."""
    done = []
    for trial in trials:
        trial.renew()
        status = trial.folder.status()
        if status.job.id is not None:
            over = refresh(trial.folder) is None
            status = trial.folder.status()
            if over:
                trial.count(seconds_of(status))
        elif status.state is State.RUNNING:
            with trial.folder.lock():
                record_failure(trial.folder, "the sweep was killed")
        if is_settled(status):
            done.append(trial)
        if status.job.id is None and (end := trial.folder.status().end):
            trial.end(end.timestamp())
    return done
