"""Asking a run to stop."""

from __future__ import annotations

import signal
from typing import Any


class Preempted(BaseException):
    """The process was asked to stop before training began. No Exception: libraries swallow those while they import."""


class StopRequest:
    """SIGTERM and SIGINT set a flag that training reads between steps: nothing is saved from a handler."""

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        self._group: Any = None
        self.listen()

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

        asked = torch.tensor(int(self.requested))
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX, group=self._group)
        self.requested = bool(asked)
        return self.requested

    @property
    def came_before_training(self) -> bool:
        """Whatever went wrong after that may be its doing: an import that was cut short fails later, and elsewhere."""
        return self.requested and not self.training

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = True
        if not self.training:
            raise Preempted(signal.Signals(number).name)
