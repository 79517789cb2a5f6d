"""The scheduler, which runs trials on free slots until there are no more or the sweep is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from qwen_cl.config.sweep import LauncherConfig
from qwen_cl.launch.signals import handle_signals
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.status import State
from qwen_cl.sweep.outcome import Outcome, StopCause, read_outcome
from qwen_cl.sweep.running import Running, Starter
from qwen_cl.sweep.slots import Slot
from qwen_cl.sweep.trial import Trial

STOPPED = "stopped on request"


class Source(Protocol):
    """A source of trials."""

    def next(self) -> Trial | None:
        """Return a trial to start now, or None if there are no more."""

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Take the outcome of a trial; called once for each, after its last attempt."""

    def stop_cause(self, trial: Trial) -> StopCause | None:
        """Return a cause to stop a running trial early, or None; called a few times a second."""

    def waiting(self) -> int:
        """Return the number of trials that have not started."""


class Scheduler:
    """The scheduler of a sweep's trials."""

    def __init__(self, slots: Sequence[Slot], config: LauncherConfig, source: Source, start: Starter) -> None:
        """Take the trials of ``source`` and start them with ``start``, one per slot."""
        self.config, self.source, self.start = config, source, start
        self.free = list(slots)
        self.running: list[Running] = []
        self.outcomes: dict[str, Outcome] = {}
        """Outcomes of the trials that ended, by name."""
        self.stopping: str | None = None
        """The reason why no more trials are started, or None."""
        self.interrupted = 0
        """Number of signals to stop so far."""
        self.retried: list[str] = []
        """The names of trials that were started again, once per retry."""
        self._handled = 0
        self._detached = False
        self._stop_causes: dict[str, StopCause] = {}
        self._retries: list[Trial] = []

    def run(self, watch: Callable[[], None]) -> None:
        """Run all trials. ``watch`` is called several times a second."""
        with handle_signals(self._interrupt):
            try:
                while self._advance():
                    watch()
                    time.sleep(0.2)
            finally:
                for process in self.running:
                    process.kill()
        watch()

    def stop(self, reason: str) -> None:
        """Start no more trials, and make the running ones save and end."""
        self.stopping = self.stopping or reason
        for process in self.running:
            self._request_stop(process, StopCause(reason, FailureKind.interrupted))

    def waiting(self) -> int:
        """Return the number of trials that have not started, or are to be retried."""
        return self.source.waiting() + len(self._retries)

    def _advance(self) -> bool:
        """Do one step; return False when no trial is left to wait for."""
        self._handle_interrupts()
        for process in [process for process in self.running if process.is_over()]:
            self._end(process)
        for process in self.running:
            if process.trial.name not in self._stop_causes and (cause := self.source.stop_cause(process.trial)):
                self._request_stop(process, cause)
        batch = []
        while self.free and self.stopping is None and (trial := self._next()):
            batch.append((trial, self.free.pop(0)))
        if batch:
            self.running += self.start(batch)
        return bool(self.running) and not self._detached

    def _next(self) -> Trial | None:
        return self._retries.pop(0) if self._retries else self.source.next()

    def _end(self, process: Running) -> None:
        trial, name = process.trial, process.trial.name
        self.running.remove(process)
        self.free.append(process.slot)
        trial.end(time.time())
        outcome = read_outcome(process, self._stop_causes.pop(name, None))
        if outcome.retriable and self.stopping is None and self.retried.count(name) < self.config.max_retries:
            self.retried.append(name)
            self._retries.append(trial)
            return
        self.outcomes[name] = outcome
        self.source.ended(trial, outcome)
        if outcome.state is State.FAILED and self.config.fail_fast:
            self.stop(f"stopped because {name} failed (hydra.launcher.fail_fast)")

    def _request_stop(self, process: Running, cause: StopCause) -> None:
        if process.trial.name not in self._stop_causes:
            self._stop_causes[process.trial.name] = cause
            process.request_stop()

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupted += 1

    def _handle_interrupts(self) -> None:
        """Make all trials save at the first signal, kill their workers at the second, and everything at the third.

        Slurm jobs keep running.
        """
        if self.interrupted and self.start.detached:
            self.stopping = self.stopping or STOPPED
            self._detached = True
            return
        while self._handled < self.interrupted:
            self._handled += 1
            if self._handled == 1:
                self.stop(STOPPED)
            for process in self.running:
                if self._handled == 2:
                    process.request_stop()
                elif self._handled > 2:
                    process.kill()
