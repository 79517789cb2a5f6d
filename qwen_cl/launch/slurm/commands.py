"""Call the Slurm commands that runs need."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_cl.config.errors import RunFailed, UserError

ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
"""States of a job that will not run again. (A PREEMPTED job that is requeued is PENDING.)"""
UNKNOWN_JOB = "Invalid job id specified"


class SlurmUnavailable(RunFailed):
    """Slurm does not answer. The job may still exist."""

    def __init__(self, reason: object) -> None:
        super().__init__(f"Slurm does not answer: {reason}")


@dataclass(frozen=True, slots=True)
class Job:
    """A job, as Slurm reports it."""

    id: str
    """``JOB``, or ``ARRAY_INDEX`` of a job array."""
    state: str
    reason: str
    """Why the job waits, or why it ended; "None" without a reason."""

    @property
    def is_over(self) -> bool:
        return self.state in ENDED

    def __str__(self) -> str:
        return f"job {self.id}: {self.state}" + ("" if self.reason in ("None", "") else f" ({self.reason})")


def submit(script: str, environment: Mapping[str, str]) -> str:
    """Submit a job on hold, so that its inputs can be written once its number is known; :func:`release` starts it.

    Raises:
        UserError: sbatch is missing, or refuses the job.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", "--hold"],
            input=script,
            env=dict(environment),
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise UserError(
            "cluster=slurm needs sbatch, which is not installed here; run this command on a machine that submits to "
            "the cluster (dry_run=true shows the batch script anywhere)"
        ) from error
    if done.returncode:
        raise UserError(f"cluster=slurm: sbatch refused the job: {_message(done)}; change the option and submit again")
    return done.stdout.strip().partition(";")[0]


def release(job: str) -> None:
    _run("scontrol", "release", job)


def query(jobs: Sequence[str]) -> dict[str, Job]:
    """Return the jobs that Slurm knows. It forgets a job some minutes after its end, unless it keeps accounting.

    Raises:
        SlurmUnavailable: Slurm does not answer.
    """
    listed = _run("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(jobs)}")
    found = _parsed(listed)
    if missing := [job for job in jobs if job not in found]:
        found |= _parsed(_run("sacct", "-n", "-X", "-P", "--format=JobID,State,Reason", f"--jobs={','.join(missing)}"))
    return {job: found[job] for job in jobs if job in found}


def signal_steps(job: str, name: str) -> None:
    """Send a signal to the steps of the job, not to the batch script itself."""
    _run("scancel", f"--signal={name}", job)


def cancel(job: str) -> None:
    """Cancel a job. One that is running has Slurm's KillWait (30 seconds by default) to end."""
    _run("scancel", job)


def may_requeue(job: str) -> bool:
    """Return whether a job can be requeued: not one that is cancelled, or that Slurm has requeued already."""
    return {"Requeue=1", "JobState=RUNNING"} <= set(_run("scontrol", "--oneliner", "show", "job", job).split())


def requeue(job: str) -> None:
    _run("scontrol", "requeue", job)


def address_of(node: str) -> str:
    """Return the address at which Slurm reaches a node, or the node's name."""
    described = _run("scontrol", "--oneliner", "show", "node", node)
    return next((word.partition("=")[2] for word in described.split() if word.startswith("NodeAddr=")), node)


def _run(*command: str) -> str:
    """Return the output of a command; empty if the job is unknown or no accounting is kept."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise SlurmUnavailable(f"{command[0]}: {error}") from error
    if done.returncode == 0 or UNKNOWN_JOB in done.stderr or command[0] == "sacct":
        return done.stdout
    raise SlurmUnavailable(_message(done))


def _parsed(lines: str) -> dict[str, Job]:
    found = {}
    for line in lines.splitlines():
        number, state, reason = line.split("|")
        found[number] = Job(number, state.split()[0], reason)  # sacct adds the user: CANCELLED by 1000
    return found


def _message(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(done.stderr.replace(f"{done.args[0]}: error: ", "").split()) or f"exit code {done.returncode}"
