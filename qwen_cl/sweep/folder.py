"""A sweep's folder: its lock, and the trials of an earlier sweep in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qwen_cl.config.errors import UserError
from qwen_cl.launch.slurm.job_status import refresh, seconds_of
from qwen_cl.runs.folder import remove_if_empty
from qwen_cl.runs.status import State
from qwen_cl.sweep.outcome import is_final, record_failure
from qwen_cl.sweep.processes import wait_for_exit
from qwen_cl.sweep.trial import Trial, read_records


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Lock the folder against other sweeps; the system releases the lock if this process dies.

    Raises:
        UserError: another sweep is using it, or it cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"hydra.sweep.dir ({directory}) cannot be created: {error.strerror}; choose another folder"
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
    """Wait for the processes of trials that a killed sweep started.

    Raises:
        UserError: one does not end.
    """
    for record in read_records(directory):
        wait_for_exit(directory / record["name"])


def finished_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that an earlier sweep finished.

    Trials whose process was killed get a final status, and the time that they took is added to their record.
    """
    done = []
    for trial in trials:
        trial.update_differing()
        status = trial.folder.status()
        if status.job.id is not None:
            over = refresh(trial.folder) is None
            status = trial.folder.status()
            if over:
                trial.count(seconds_of(status))
        elif status.state is State.RUNNING:
            with trial.folder.lock():
                record_failure(trial.folder, "the sweep was killed")
        if is_final(status):
            done.append(trial)
        if status.job.id is None and (end := trial.folder.status().end):
            trial.end(end.timestamp())
    return done
