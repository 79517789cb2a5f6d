"""The arithmetic of the step clock; a GPU's events are stood in for by ones that know when they come."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest

from qwen_cl.training.callbacks.step_timer import StepClock


@dataclass
class Event:
    """A GPU event at a given number of milliseconds."""

    comes: float

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return later.comes - self.comes


def test_steps_end_when_the_gpu_was_through_and_not_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = StepClock()
    monkeypatch.setattr(clock, "mark", lambda: Event(1000.0))
    now = 50.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert clock.start() == 50.0
    now = 60.0  # both are asked for late, and together
    assert [clock.wait(Event(1500.0)), clock.wait(Event(2250.0))] == [50.5, 51.25]
    now = 51.5
    assert clock.wait(Event(3000.0)) == 51.5  # nothing has ended that is still to come


def test_on_a_cpu_a_step_has_ended_when_it_is_asked_for() -> None:
    clock = StepClock()
    begun = clock.start()
    assert clock.mark() is None
    assert begun <= clock.wait(None) <= time.monotonic()
