"""Fix the processes that write a checkpoint during training.

They are forked, so they see host memory as it was then. Tensors from a GPU are staged in pinned memory that they share
with this process; it must not be released until they have finished. (megatron-core 0.15 releases it at once, and its
next user overwrites the checkpoint: NVIDIA/Megatron-LM, pull request 2288.)
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
"""Seconds. The process that waits for the writers takes the result of a finished one at once."""
ASK_EVERY = 0.05
LOST = "results_queue should not be empty"
"""Megatron's error on each rank whose writers left no result."""


_staged: list[Any] = []
"""The tensors of the checkpoint that is being written; there is at most one."""


def retain_staged_tensors() -> None:
    """Retain staged tensors until the writers have finished."""
    stock = FileSystemWriterAsync.preload_tensors

    def preload(write_buckets: Any, non_blocking: bool = True) -> Any:
        _staged[:] = [stock(write_buckets, non_blocking)]
        return _staged[0]

    replace(FileSystemWriterAsync, "preload_tensors", staticmethod(preload))


class Writers:
    """The writers of one rank, for one checkpoint at a time."""

    def __init__(self, calls: AsyncCallsQueue) -> None:
        self.calls = calls
        self._ended: float | None = None

    def end(self) -> None:
        """Terminate the writers, as this process could not end before them."""
        for call in self.calls.async_calls:
            call.async_caller.close(abort=True)

    def are_finished(self, *, wait: bool) -> bool:
        """Return whether the writers of all ranks have finished and the index is written; every rank must call.

        Raises:
            CheckpointException: on every rank, if a writer of any rank failed or was killed.
        """
        try:
            while not self.calls.maybe_finalize_async_calls(blocking=False):
                self._end_if_killed()
                if not wait:
                    return False
                time.sleep(ASK_EVERY)
            return True
        finally:
            if not self.calls.async_calls:
                self._ended = None
                _staged.clear()

    def _end_if_killed(self) -> None:
        """End the writers if one was killed, as the process that started it would wait forever."""
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
