"""The processes that write a checkpoint while training goes on.

They are forked, so that what is on the host they see as it was then. What comes from a GPU is staged in pinned memory,
which they share with this process: it is held until they are through. (megatron-core 0.15 gives it back at once, and
whoever gets it next writes into the checkpoint: NVIDIA/Megatron-LM, pull request 2288.)
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import psutil
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from qwen_cl.patches.registry import replace

LOST_AFTER = 10.0
"""Seconds. The process that waits for the others takes the result of one that is through at once."""
ASK_EVERY = 0.05
LOST = "results_queue should not be empty"
"""What Megatron says, of each rank, where its processes left nothing."""


_staged: list[Any] = []
"""What is being written, of the one checkpoint that may be."""


def hold_what_is_staged() -> None:
    """Keep it until the writers are through."""
    stock = FileSystemWriterAsync.preload_tensors

    def preload(write_buckets: Any, non_blocking: bool = True) -> Any:
        _staged[:] = [stock(write_buckets, non_blocking)]
        return _staged[0]

    replace(FileSystemWriterAsync, "preload_tensors", staticmethod(preload))


class Writers:
    """Of one rank, and one checkpoint at a time."""

    def __init__(self, calls: AsyncCallsQueue) -> None:
        self.calls = calls
        self._ended: float | None = None

    def end(self) -> None:
        """Whatever they were writing: this process could not end before them."""
        for call in self.calls.async_calls:
            call.async_caller.close(abort=True)

    def are_through(self, *, wait: bool) -> bool:
        """On all ranks, and the index of what they wrote is there too; every rank calls.

        Raises:
            CheckpointException: on every rank, where one of them failed, or was killed.
        """
        try:
            while not self.calls.maybe_finalize_async_calls(blocking=False):
                self._give_up_lost_ones()
                if not wait:
                    return False
                time.sleep(ASK_EVERY)
            return True
        finally:
            if not self.calls.async_calls:
                self._ended = None
                _staged.clear()

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
