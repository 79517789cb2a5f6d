"""Handle requests to stop a run."""

from __future__ import annotations

import signal
import time
from typing import Any

from qwen_cl.runs.failure import FailureKind

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends before a job's time limit (``sbatch --signal=USR1@SECONDS``)."""

REASONS = {
    None: None,
    FailureKind.time_limit: "task.max_time is up",
    FailureKind.interrupted: "stopped on request",
}
"""If ranks have different reasons, the last in this order counts."""


class Preempted(BaseException):
    """A stop request came before training began. Not an Exception, because libraries suppress those on import."""


class StopRequest:
    """A flag that signals and the time limit set, and that training reads between steps: nothing is saved in a
    handler."""

    def __init__(self, max_seconds: float | None = None) -> None:
        """Start the time limit of ``max_seconds``."""
        self.kind: FailureKind | None = None
        """The reason to stop, or None."""
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
        """Defer signals to the end of a step from now on, and replace Lightning's handlers, which raise anywhere."""
        self.training = True
        self.listen()
        import torch

        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._group = torch.distributed.new_group(backend="gloo")  # on the host, which does not wait for the GPU

    def agreed(self) -> bool:
        """Return whether any rank has a stop request.

        Every rank calls this after each step: a signal reaches the ranks at different steps, and all must stop after
        the same.
        """
        if self._group is None:
            return self.requested
        import torch

        kinds = list(REASONS)
        request = torch.tensor(kinds.index(self.kind) if self.requested else 0)
        torch.distributed.all_reduce(request, op=torch.distributed.ReduceOp.MAX, group=self._group)
        self.kind = kinds[int(request)]
        return self.requested

    @property
    def came_before_training(self) -> bool:
        """Return whether a request came before training; it may have caused any later error, such as a broken
        import."""
        return self.kind is not None and not self.training

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.kind = FailureKind.interrupted
        if not self.training:
            raise Preempted(signal.Signals(number).name)
