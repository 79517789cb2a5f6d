"""Saves a checkpoint without starting a server process for its results."""

from __future__ import annotations

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async


def install() -> None:
    """The writer's processes hand their results to this one, which puts them in a queue for itself: with
    ``ckpt_async_save=False`` nobody else reads it. Megatron spawns a manager for that queue, which imports torch
    again: three seconds of a laptop's first checkpoint."""
    filesystem_async._results_queue = queue.Queue()
