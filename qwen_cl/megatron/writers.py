"""The processes that write a checkpoint while training goes on: forked, so that they see what was in memory then."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

LOST_AFTER = 10.0
"""Seconds. The process that waits for the others takes the result of one that is through at once."""
ASK_EVERY = 0.05
LOST = "results_queue should not be empty"
"""What Megatron says, of each rank, where its processes left nothing."""


class Writers:
    """Of one rank, and one checkpoint at a time."""

    def __init__(self, calls: AsyncCallsQueue) -> None:
        self.calls = calls
        self._ended: float | None = None

    def are_through(self, *, wait: bool) -> bool:
        """On all ranks, and the index of what they wrote is there too; every rank calls.

        Raises:
            CheckpointException: on every rank, where one of them failed, or was killed.
        """
        while not self.calls.maybe_finalize_async_calls(blocking=False):
            self._give_up_lost_ones()
            if not wait:
                return False
            time.sleep(ASK_EVERY)
        return True

    def _give_up_lost_ones(self) -> None:
        """Where a process that writes was killed, the one that started it waits forever."""
        waiting = self.calls.async_calls[0].async_caller.process
        writing = False
        if waiting is not None and waiting.is_alive():
            with suppress(psutil.Error):
                writers = psutil.Process(waiting.pid).children()
                writing = not writers or any(writer.status() != psutil.STATUS_ZOMBIE for writer in writers)
        if writing:
            self._ended = None
        elif self._ended is None:
            self._ended = time.monotonic()
        elif time.monotonic() > self._ended + LOST_AFTER and waiting is not None:
            waiting.kill()
