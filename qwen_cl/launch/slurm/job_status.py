"""Determine the status of a submitted run: its own record if it has a final one, else the state of its Slurm job."""

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
"""Final job states that would recur or that were requested. After any other, another attempt may succeed."""

CANCELLED = ".cancelled"
"""File in the folder of a run that was asked to end, so that it is not requeued. It is separate from status.json, which
only the run itself writes while it is running."""


def refresh(folder: RunFolder) -> Job | None:
    """Return the run's job if it is not over. If it is over without a final status of the run, record one.

    A PREEMPTED run may be in the queue again: Slurm requeues the jobs that it preempts.

    Raises:
        SlurmUnavailable: Slurm does not answer; nothing was changed.
    """
    number = folder.status().job.id
    if number is None:
        return None
    job = commands.query([number]).get(number)
    if job is None or job.is_over:
        record_job_state(folder, number, job)
        return None
    return job


def seconds_of(status: RunStatus) -> float:
    """Return the seconds of all starts of a run's job.

    If a node failed, the start counts until that was noticed; if another start followed, its length is unknown.
    """
    job = status.job
    if not job.start:
        return job.seconds_before
    return job.seconds_before + ((job.end or status.end or now()) - job.start).total_seconds()


def record_job_state(folder: RunFolder, number: str, job: Job | None) -> None:
    """Record the final status of a run whose job is over; ``job`` is None if Slurm does not know it any more."""
    status = folder.status()  # again: it may have changed before Slurm's answer
    if status.job.id != number or not status.is_open:
        return
    state = "unknown to Slurm" if job is None else job.state
    how = f"job {number}: {state}" if job is None or state == "CANCELLED" else str(job)  # CANCELLED: why it waited
    waited = status.state is State.SUBMITTED
    if waited and state == "CANCELLED":
        folder.finish(State.PREEMPTED, f"{how}, before it started", FailureKind.interrupted)
        return
    when = "before the run started" if waited else "before the run recorded how it ended"
    kind = KINDS.get(state, FailureKind.rank_lost)
    folder.finish(State.FAILED, f"{how}, {when}", kind, retriable=state not in KINDS)


def request_end(folder: RunFolder, number: str) -> None:
    """Request that a running run saves a checkpoint, ends and is not requeued. Slurm alone would give it seconds."""
    (folder.directory / CANCELLED).touch()
    commands.signal_steps(number, "TERM")


def require_no_job(folder: RunFolder) -> None:
    """Refuse to start a run in a folder whose job is waiting or running.

    Raises:
        UserError: the folder has such a job, or its Slurm state is unknown.
    """
    try:
        job = refresh(folder)
    except commands.SlurmUnavailable as error:
        raise UserError(
            f"hydra.run.dir ({folder.directory}) was submitted, and its Slurm state is unknown ({error}); choose "
            "another folder, or wait"
        ) from error
    if job is not None:
        raise UserError(
            f"hydra.run.dir ({folder.directory}) is in use by {job}; follow it with task=job task.run="
            f"{folder.directory} task.action=follow, or end it with task.action=cancel"
        )
