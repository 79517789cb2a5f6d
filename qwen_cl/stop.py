"""Asking a run to stop."""

from __future__ import annotations

import signal
import time
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends before a job's time is up (``sbatch --signal=USR1@SECONDS``)."""


class Preempted(BaseException):
    """The process was asked to stop before training began. No Exception: libraries swallow those while they import."""


class StopRequest:
    """Signals set a flag that training reads between steps, and so does the clock: nothing is saved from a handler."""

    def __init__(self, max_seconds: float | None = None) -> None:
        """``max_seconds`` is counted from now on."""
        self.reason: str | None = None
        """Why, once there is a request."""
        self.training = False
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.listen()

    @property
    def requested(self) -> bool:
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "task.max_time is up"
        return self.reason is not None

    def begin_training(self) -> None:
        """From now on a signal waits for the end of the step. Lightning has put its own handlers in between, which
        would raise from wherever training is."""
        self.training = True
        self.listen()

    @property
    def came_before_training(self) -> bool:
        """Whatever went wrong after that may be its doing: an import that was cut short fails later, and elsewhere."""
        return self.reason is not None and not self.training

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.reason = "stopped on request"
        if not self.training:
            raise Preempted(signal.Signals(number).name)
