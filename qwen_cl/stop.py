"""Asking a run to stop."""

from __future__ import annotations

import signal
from typing import Any


class Preempted(Exception):
    """The process was asked to stop before training began."""


class StopRequest:
    """SIGTERM and SIGINT set a flag that training reads between steps: nothing is saved from a handler."""

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        self.listen()

    def begin_training(self) -> None:
        """From now on a signal waits for the end of the step. Lightning has put its own handlers in between, which
        would raise from wherever training is."""
        self.training = True
        self.listen()

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = True
        if not self.training:
            raise Preempted(signal.Signals(number).name)
