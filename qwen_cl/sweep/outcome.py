"""How a trial went, by its own record."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace

from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import RunStatus, State
from qwen_cl.sweep.running import Running


@dataclass(frozen=True, slots=True)
class StopCause:
    """The cause for which a sweep asks a trial to stop."""

    reason: str
    kind: FailureKind


@dataclass(frozen=True, slots=True)
class Outcome:
    state: State
    reason: str | None
    kind: FailureKind | None = None
    lost: bool = False
    """Its process died of something outside it, and another try may go well."""

    @property
    def pruned(self) -> bool:
        return self.state is State.PREEMPTED and self.kind is FailureKind.pruned


def read_outcome(process: Running, asked: StopCause | None) -> Outcome:
    """Return how a trial ended that is over. ``asked`` is why we asked it to stop, if we did."""
    folder = process.trial.folder
    status = folder.status()
    if status.state is None:
        return _never_started(process, asked)
    if status.state is State.RUNNING:
        record_failure(folder, f"the launcher was {_how(process.returncode)}")
    if folder.status().state is State.PREEMPTED and asked is not None:
        folder.update_status(reason=asked.reason, failure_kind=asked.kind)
    outcome = outcome_of(folder.status())
    killed = process.returncode < 0 and asked is None and outcome.state is not State.COMPLETED
    return replace(outcome, lost=killed or outcome.lost)


def record_failure(folder: RunFolder, reason: str) -> None:
    """Write the final status of a run whose process ended without one."""
    folder.finish(State.FAILED, reason, FailureKind.rank_lost, retriable=True)


def outcome_of(status: RunStatus) -> Outcome:
    """Return how a trial ended by its own record; one without a final status was lost."""
    if status.state is None:
        return Outcome(State.FAILED, None, lost=True)
    lost = status.state is not State.COMPLETED and status.retriable
    return Outcome(status.state, status.reason, status.failure_kind, lost)


def is_settled(status: RunStatus) -> bool:
    """Return True where nothing is left to do: a sweep that is started again leaves the trial as it is."""
    outcome = outcome_of(status)
    return outcome.state is State.COMPLETED or outcome.pruned


def _never_started(process: Running, asked: StopCause | None) -> Outcome:
    if asked is not None:
        return Outcome(State.PREEMPTED, f"{asked.reason}, before it started", asked.kind)
    if process.returncode < 0:
        why = f"the launcher was {_how(process.returncode)} before the run started"
        return Outcome(State.FAILED, why, FailureKind.rank_lost, lost=True)
    return Outcome(State.FAILED, process.last_log_line(), FailureKind.error)


def _how(returncode: int) -> str:
    return f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"gone, exit code {returncode}"
