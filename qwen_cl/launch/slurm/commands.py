"""Slurm's own commands, as far as runs need them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_cl.config.errors import RunFailed, UserError

ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
"""States of a job that will not run again. (PREEMPTED: where it is requeued instead, it is PENDING.)"""
UNKNOWN_JOB = "Invalid job id specified"


class SlurmUnavailable(RunFailed):
    """Nothing is known, which is not the same as that a job is gone."""

    def __init__(self, reason: object) -> None:
        super().__init__(f"Slurm does not answer: {reason}")


@dataclass(frozen=True, slots=True)
class Job:
    """As Slurm sees it."""

    id: str
    """``JOB``, or ``ARRAY_INDEX``."""
    state: str
    reason: str
    """Why it waits, or why it ended; "None" where there is nothing to say."""

    @property
    def is_over(self) -> bool:
        return self.state in ENDED

    def __str__(self) -> str:
        return f"job {self.id}: {self.state}" + ("" if self.reason in ("None", "") else f" ({self.reason})")


def submit(script: str, environment: Mapping[str, str]) -> str:
    """Held, so that what it needs can be written once its number is known; :func:`release` lets it go.

    Raises:
        UserError: Slurm is not there, or does not take it.
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
            "cluster=slurm needs sbatch, which is not here; run this command on a machine that submits to the cluster "
            "(dry_run=true shows the batch script anywhere)"
        ) from error
    if done.returncode:
        raise UserError(f"cluster=slurm: sbatch refused the job: {_said(done)}; change what it names, and submit again")
    return done.stdout.strip().partition(";")[0]


def release(job: str) -> None:
    _run("scontrol", "release", job)


def ask(jobs: Sequence[str]) -> dict[str, Job]:
    """What is known of them. Slurm forgets a job some minutes after its end, unless it keeps accounts.

    Raises:
        SlurmSilent: it does not answer.
    """
    listed = _run("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(jobs)}")
    found = _parsed(listed)
    if missing := [job for job in jobs if job not in found]:
        found |= _parsed(_run("sacct", "-n", "-X", "-P", "--format=JobID,State,Reason", f"--jobs={','.join(missing)}"))
    return {job: found[job] for job in jobs if job in found}


def signal_steps(job: str, name: str) -> None:
    """What the job's script started gets the signal; the script itself goes on."""
    _run("scancel", f"--signal={name}", job)


def cancel(job: str) -> None:
    """Waiting, it never starts; running, it has Slurm's KillWait (30 seconds, where nobody changed it) to end."""
    _run("scancel", job)


def may_requeue(job: str) -> bool:
    """False also where it is cancelled, or Slurm has taken it back already."""
    return {"Requeue=1", "JobState=RUNNING"} <= set(_run("scontrol", "--oneliner", "show", "job", job).split())


def requeue(job: str) -> None:
    _run("scontrol", "requeue", job)


def address_of(node: str) -> str:
    """The one at which Slurm reaches it; its name where it has no other."""
    described = _run("scontrol", "--oneliner", "show", "node", node)
    return next((word.partition("=")[2] for word in described.split() if word.startswith("NodeAddr=")), node)


def _run(*command: str) -> str:
    """What it printed; nothing where it knows no such job, or keeps no accounts."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise SlurmUnavailable(f"{command[0]}: {error}") from error
    if done.returncode == 0 or UNKNOWN_JOB in done.stderr or command[0] == "sacct":
        return done.stdout
    raise SlurmUnavailable(_said(done))


def _parsed(lines: str) -> dict[str, Job]:
    found = {}
    for line in lines.splitlines():
        number, state, reason = line.split("|")
        found[number] = Job(number, state.split()[0], reason)  # sacct says who: CANCELLED by 1000
    return found


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(done.stderr.replace(f"{done.args[0]}: error: ", "").split()) or f"exit code {done.returncode}"
