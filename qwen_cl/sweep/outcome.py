"""The outcome of a trial, from the status of its run."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace

from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import RunStatus, State
from qwen_cl.sweep.running import Running


@dataclass(frozen=True, slots=True)
class StopCause:
    """The reason for which a sweep stops a trial."""

    reason: str
    kind: FailureKind


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a trial."""

    state: State
    reason: str | None
    kind: FailureKind | None = None
    retriable: bool = False
    """True if its process was killed from outside, and another attempt may succeed."""

    @property
    def pruned(self) -> bool:
        """True if the search stopped it early."""
        return self.state is State.PREEMPTED and self.kind is FailureKind.pruned


def read_outcome(process: Running, stop_cause: StopCause | None) -> Outcome:
    """Return the outcome of a trial that is over. ``stop_cause`` is given if the sweep stopped it."""
    folder = process.trial.folder
    status = folder.status()
    if status.state is None:
        return _never_started(process, stop_cause)
    if status.state is State.RUNNING:
        record_failure(folder, f"the launcher {_describe_exit(process.returncode)}")
    if folder.status().state is State.PREEMPTED and stop_cause is not None:
        folder.update_status(reason=stop_cause.reason, failure_kind=stop_cause.kind)
    outcome = outcome_of(folder.status())
    killed = process.returncode < 0 and stop_cause is None and outcome.state is not State.COMPLETED
    return replace(outcome, retriable=killed or outcome.retriable)


def record_failure(folder: RunFolder, reason: str) -> None:
    """Write the final status of a run whose process ended without one."""
    folder.finish(State.FAILED, reason, FailureKind.rank_lost, retriable=True)


def outcome_of(status: RunStatus) -> Outcome:
    """Return the outcome that a status records; a trial without one is retriable."""
    if status.state is None:
        return Outcome(State.FAILED, None, retriable=True)
    retriable = status.state is not State.COMPLETED and status.retriable
    return Outcome(status.state, status.reason, status.failure_kind, retriable)


def is_final(status: RunStatus) -> bool:
    """Return True if the trial completed or was pruned: a resumed sweep does not start it again."""
    outcome = outcome_of(status)
    return outcome.state is State.COMPLETED or outcome.pruned


def _never_started(process: Running, stop_cause: StopCause | None) -> Outcome:
    if stop_cause is not None:
        return Outcome(State.PREEMPTED, f"{stop_cause.reason}, before it started", stop_cause.kind)
    if process.returncode < 0:
        reason = f"the launcher {_describe_exit(process.returncode)} before the run started"
        return Outcome(State.FAILED, reason, FailureKind.rank_lost, retriable=True)
    return Outcome(State.FAILED, process.last_log_line(), FailureKind.error)


def _describe_exit(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"exited with code {returncode}"
