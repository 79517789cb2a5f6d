"""Measure when a step ended without waiting for it, by the GPU's clock."""

from __future__ import annotations

import time

import torch


class StepClock:
    """A clock that advances from step to step with the GPU's events.

    Event times are fp32 milliseconds, which lose digits over long intervals. Times are those of ``time.monotonic``; on
    a CPU a step has ended when it is read.
    """

    def __init__(self) -> None:
        self._at = 0.0
        self._event: torch.cuda.Event | None = None

    def start(self) -> float:
        """Wait for the GPU, and return the time."""
        self._event = self.mark()
        if self._event is not None:
            self._event.synchronize()
        self._at = time.monotonic()
        return self._at

    def mark(self) -> torch.cuda.Event | None:
        """Return an event at the end of the work queued on the GPU so far; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, event: torch.cuda.Event | None) -> float:
        """Wait for the event, and return its time."""
        if event is None:
            return time.monotonic()
        event.synchronize()
        now = time.monotonic()
        if self._event is not None:
            now = min(now, self._at + self._event.elapsed_time(event) / 1e3)
        self._at, self._event = now, event
        return now
