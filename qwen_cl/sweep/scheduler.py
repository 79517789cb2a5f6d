"""Trials onto slots: as many at a time as fit, until there are no more or somebody says stop."""

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
    """Where trials come from."""

    def next(self) -> Trial | None:
        """To start now; None when there are no more."""

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Once for each trial, when it is not tried again."""

    def why_stop(self, trial: Trial) -> StopCause | None:
        """A few times a second for each that runs: a reason to ask it to stop early."""

    def waiting(self) -> int:
        """How many there still are."""


class Scheduler:
    def __init__(self, slots: Sequence[Slot], config: LauncherConfig, source: Source, start: Starter) -> None:
        self.config, self.source, self.start = config, source, start
        self.free = list(slots)
        self.running: list[Running] = []
        self.outcomes: dict[str, Outcome] = {}
        """By name, of those that ended."""
        self.stopping: str | None = None
        """Why, once no more are started."""
        self.interrupted = 0
        """How often we were asked to stop."""
        self.retried: list[str] = []
        """A name for each time that one was started again."""
        self._heeded = 0
        self._left = False
        self._asked: dict[str, StopCause] = {}
        self._again: list[Trial] = []

    def run(self, watch: Callable[[], None]) -> None:
        """To the end. ``watch`` is called several times a second."""
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
        """No more are started, and those that run are asked to save and end."""
        self.stopping = self.stopping or reason
        for process in self.running:
            self._ask(process, StopCause(reason, FailureKind.interrupted))

    def waiting(self) -> int:
        """How many were not started, or not again."""
        return self.source.waiting() + len(self._again)

    def _advance(self) -> bool:
        """False when there is nothing left to wait for."""
        self._heed_interrupts()
        for process in [process for process in self.running if process.is_over()]:
            self._end(process)
        for process in self.running:
            if process.trial.name not in self._asked and (cause := self.source.why_stop(process.trial)):
                self._ask(process, cause)
        batch = []
        while self.free and self.stopping is None and (trial := self._next()):
            batch.append((trial, self.free.pop(0)))
        if batch:
            self.running += self.start(batch)
        return bool(self.running) and not self._left

    def _next(self) -> Trial | None:
        return self._again.pop(0) if self._again else self.source.next()

    def _end(self, process: Running) -> None:
        trial, name = process.trial, process.trial.name
        self.running.remove(process)
        self.free.append(process.slot)
        trial.end(time.time())
        outcome = read_outcome(process, self._asked.pop(name, None))
        if outcome.lost and self.stopping is None and self.retried.count(name) < self.config.max_retries:
            self.retried.append(name)
            self._again.append(trial)
            return
        self.outcomes[name] = outcome
        self.source.ended(trial, outcome)
        if outcome.state is State.FAILED and self.config.fail_fast:
            self.stop(f"stopped because {name} failed (hydra.launcher.fail_fast)")

    def _ask(self, process: Running, cause: StopCause) -> None:
        if process.trial.name not in self._asked:
            self._asked[process.trial.name] = cause
            process.ask_to_stop()

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupted += 1

    def _heed_interrupts(self) -> None:
        """The first time all are asked to save, the second their workers are killed, and then everything. Jobs of a
        cluster go on without us."""
        if self.interrupted and self.start.leaves:
            self.stopping = self.stopping or STOPPED
            self._left = True
            return
        while self._heeded < self.interrupted:
            self._heeded += 1
            if self._heeded == 1:
                self.stop(STOPPED)
            for process in self.running:
                if self._heeded == 2:
                    process.ask_to_stop()
                elif self._heeded > 2:
                    process.kill()
