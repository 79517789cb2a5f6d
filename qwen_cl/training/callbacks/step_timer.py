"""When a step ended, though nobody waited for it: by the GPU's own clock."""

from __future__ import annotations

import time

import torch


class StepClock:
    """Counts on from a moment at which the GPU was waited for, and from step to step: in an event's fp32 milliseconds a
    longer stretch would lose digits. Times are those of ``time.monotonic``; on a CPU a step has ended when it is asked.
    """

    def __init__(self) -> None:
        self._at = 0.0
        self._event: torch.cuda.Event | None = None

    def start(self) -> float:
        """Now, after all that the GPU was given."""
        self._event = self.mark()
        if self._event is not None:
            self._event.synchronize()
        self._at = time.monotonic()
        return self._at

    def mark(self) -> torch.cuda.Event | None:
        """The end of what the GPU was given so far; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, event: torch.cuda.Event | None) -> float:
        """Until then; returns when that was."""
        if event is None:
            return time.monotonic()
        event.synchronize()
        now = time.monotonic()
        if self._event is not None:
            now = min(now, self._at + self._event.elapsed_time(event) / 1e3)
        self._at, self._event = now, event
        return now
