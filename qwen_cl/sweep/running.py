"""The interface of trials that run on this machine or as Slurm jobs, and of what starts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qwen_cl.sweep.slots import Slot
from qwen_cl.sweep.trial import Trial


class Running(Protocol):
    """A trial that was started."""

    trial: Trial
    slot: Slot

    @property
    def state(self) -> str:
        """RUNNING, or SUBMITTED while its job is pending."""

    @property
    def returncode(self) -> int:
        """The exit code; negative if its process was killed by a signal."""

    def is_over(self) -> bool:
        """Return True if it and its child processes have ended."""

    def request_stop(self) -> None:
        """Make it save a checkpoint and end as PREEMPTED."""

    def kill(self) -> None:
        """Kill its processes at once."""

    def last_log_line(self) -> str:
        """Return the last output of a trial that ended before its run had a folder."""


class Starter(Protocol):
    """An object that starts trials."""

    detached: bool
    """True if trials keep running when the sweep is interrupted."""

    def preview(self, trials: Sequence[Trial]) -> str:
        """Return what a dry run shows besides the trials' names; may be empty."""

    def __call__(self, batch: Sequence[tuple[Trial, Slot]]) -> Sequence[Running]:
        """Start the trials, or find those that are running already."""
