"""Asking a run to stop."""

from __future__ import annotations

import signal
import time
from typing import Any

from qwen_cl.runs.failure import FailureKind

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends before a job's time is up (``sbatch --signal=USR1@SECONDS``)."""

REASONS = {
    None: None,
    FailureKind.time_limit: "task.max_time is up",
    FailureKind.interrupted: "stopped on request",
}
"""Where ranks have different ones, the last of them counts."""


class Preempted(BaseException):
    """The process was asked to stop before training began. No Exception: libraries swallow those while they import."""


class StopRequest:
    """Signals set a flag that training reads between steps, and so does the clock: nothing is saved from a handler."""

    def __init__(self, max_seconds: float | None = None) -> None:
        """``max_seconds`` is counted from now on."""
        self.kind: FailureKind | None = None
        """Why to stop, once there is a request."""
        self.training = False
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._group: Any = None
        self.listen()

    @property
    def reason(self) -> str | None:
        return REASONS[self.kind]

    @property
    def requested(self) -> bool:
        if self.kind is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.kind = FailureKind.time_limit
        return self.kind is not None

    def begin_training(self) -> None:
        """From now on a signal waits for the end of the step. Lightning has put its own handlers in between, which
        would raise from wherever training is."""
        self.training = True
        self.listen()
        import torch

        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._group = torch.distributed.new_group(backend="gloo")  # a wish is on the host, and waits for no GPU

    def agreed(self) -> bool:
        """Whether any rank was asked. Every rank calls this after each step, for a signal reaches them at different
        ones, and all must stop at the same."""
        if self._group is None:
            return self.requested
        import torch

        kinds = list(REASONS)
        asked = torch.tensor(kinds.index(self.kind) if self.requested else 0)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX, group=self._group)
        self.kind = kinds[int(asked)]
        return self.requested

    @property
    def came_before_training(self) -> bool:
        """Whatever went wrong after that may be its doing: an import that was cut short fails later, and elsewhere."""
        return self.kind is not None and not self.training

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.kind = FailureKind.interrupted
        if not self.training:
            raise Preempted(signal.Signals(number).name)
