"""What a sweep asks of those that run its trials, on this machine or in a cluster's queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qwen_cl.sweep.slots import Slot
from qwen_cl.sweep.trial import Trial


class Running(Protocol):
    """A trial that was started, on this machine or another."""

    trial: Trial
    slot: Slot

    @property
    def state(self) -> str:
        """RUNNING, or where it waits for its turn SUBMITTED."""

    @property
    def returncode(self) -> int:
        """Below 0 where its process was killed."""

    def is_over(self) -> bool:
        """It and all that it started."""

    def ask_to_stop(self) -> None:
        """To save, and end as PREEMPTED."""

    def kill(self) -> None: ...

    def last_log_line(self) -> str:
        """Of one that ended before its run had a folder."""


class Starter(Protocol):
    leaves: bool
    """Whether what it started goes on when the sweep is interrupted."""

    def preview(self, trials: Sequence[Trial]) -> str:
        """What a dry run shows of them, beside their names; nothing where there is nothing more."""

    def __call__(self, batch: Sequence[tuple[Trial, Slot]]) -> Sequence[Running]:
        """Start those that can start now, or find them where they run already."""
