"""What became of a submitted run: its own word where it has one, and else Slurm's."""

from __future__ import annotations

from qwen_cl.config.errors import UserError
from qwen_cl.launch.slurm import commands
from qwen_cl.launch.slurm.commands import Job
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import RunStatus, State, now

KINDS = {
    "CANCELLED": FailureKind.interrupted,
    "TIMEOUT": FailureKind.time_limit,
    "DEADLINE": FailureKind.time_limit,
    "OUT_OF_MEMORY": FailureKind.out_of_memory,
}
"""Ends of a job that come again, or were asked for; in any other the run was lost to an accident."""

CANCELLED = ".cancelled"
"""In a run's folder once it was asked to end: it does not go back into the queue. A file of its own, because whoever
asks must not write to the status of a run that is going."""


def refresh(folder: RunFolder) -> Job | None:
    """The run's job, if it is not over. If it is, and the run has not said how it ended, that is written for it.
    (A run that says PREEMPTED may be back in the queue: Slurm does that itself where it preempts.)

    Raises:
        SlurmSilent: Slurm does not answer; nothing was changed.
    """
    number = folder.status().job.id
    if number is None:
        return None
    job = commands.ask([number]).get(number)
    if job is None or job.is_over:
        record_job_state(folder, number, job)
        return None
    return job


def seconds_of(status: RunStatus) -> float:
    """What all starts of a run's job took. One whose node went down ended when that was noticed; if another start
    followed, nobody knows how long it was."""
    job = status.job
    if not job.start:
        return job.seconds_before
    return job.seconds_before + ((job.end or status.end or now()) - job.start).total_seconds()


def record_job_state(folder: RunFolder, number: str, job: Job | None) -> None:
    """The last word for a run whose job is over; ``job`` is None where Slurm knows it no more."""
    status = folder.status()  # again: it may have spoken between our looking and Slurm's answer
    if status.job.id != number or not status.is_open:
        return
    state = "forgotten" if job is None else job.state
    how = f"job {number}: {state}" if job is None or state == "CANCELLED" else str(job)  # it was why it waited
    waited = status.state is State.SUBMITTED
    if waited and state == "CANCELLED":
        folder.finish(State.PREEMPTED, f"{how}, before it started", FailureKind.interrupted)
        return
    when = "before the run started" if waited else "before the run could say how it ended"
    kind = KINDS.get(state, FailureKind.rank_lost)
    folder.finish(State.FAILED, f"{how}, {when}", kind, retriable=state not in KINDS)


def ask_to_end(folder: RunFolder, number: str) -> None:
    """A run that goes saves a checkpoint, and does not go back into the queue. Slurm alone would give it seconds."""
    (folder.directory / CANCELLED).touch()
    commands.signal_steps(number, "TERM")


def require_no_job(folder: RunFolder) -> None:
    """Before a run starts in the folder.

    Raises:
        UserError: there is one, in a job that is waiting or running, or nobody can say whether it is.
    """
    try:
        job = refresh(folder)
    except commands.SlurmUnavailable as error:
        raise UserError(
            f"hydra.run.dir ({folder.directory}) was submitted, and nobody says what became of it ({error}); choose "
            "another folder, or wait"
        ) from error
    if job is not None:
        raise UserError(
            f"hydra.run.dir ({folder.directory}) is in use by {job}; follow it with task=job task.run="
            f"{folder.directory} task.action=follow, or end it with task.action=cancel"
        )
