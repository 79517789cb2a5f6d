"""How a trial went, by its own record."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from qwen_cl.run_folder import RunFolder, State, now
from qwen_cl.sweep.running import Running

PRUNED = "pruned: "
"""How the reason of a trial begins that was stopped because others were better; it is not run again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    state: State
    reason: str | None
    lost: bool = False
    """Its process died of something outside it, and another try may go well."""

    @property
    def pruned(self) -> bool:
        return self.state is State.PREEMPTED and (self.reason or "").startswith(PRUNED)


def judge(process: Running, asked: str | None) -> Outcome:
    """Of a trial that is over. ``asked`` is why we asked it to stop, if we did."""
    folder = process.trial.folder
    status = folder.status()
    killed = process.returncode < 0 and asked is None
    if not status:
        return _never_started(process, asked)
    if status["state"] == State.RUNNING:
        settle(folder, f"the launcher was {_how(process.returncode)}")
    if status["state"] == State.PREEMPTED and asked is not None:
        folder.update_status(reason=asked)
    status = folder.status()
    state = State(status["state"])
    lost = state is not State.COMPLETED and (killed or bool(status.get("worker_lost")))
    return Outcome(state, status["reason"], lost)


def settle(folder: RunFolder, reason: str) -> None:
    """The last word for a run that died without one."""
    folder.update_status(state=State.FAILED, reason=reason, end=now(), worker_lost=True)


def is_settled(status: dict[str, Any]) -> bool:
    """Nothing is left to do: a sweep that goes on leaves it as it is."""
    if not status:
        return False
    outcome = Outcome(State(status["state"]), status["reason"])
    return outcome.state is State.COMPLETED or outcome.pruned


def _never_started(process: Running, asked: str | None) -> Outcome:
    if asked is not None:
        return Outcome(State.PREEMPTED, f"{asked}, before it started")
    if process.returncode < 0:
        return Outcome(State.FAILED, f"the launcher was {_how(process.returncode)} before the run started", lost=True)
    return Outcome(State.FAILED, process.last_words())


def _how(returncode: int) -> str:
    return f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"gone, exit code {returncode}"
