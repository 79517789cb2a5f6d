"""Check the disk space for a checkpoint, and describe a failed save."""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from rich.filesize import decimal

from qwen_cl.config.errors import NO_ROOM_ADVICE
from qwen_cl.patches.async_writers import LOST
from qwen_cl.runs.checkpoints import size_of
from qwen_cl.runs.failure import FailureKind, failure_kind_of

ADAM_BYTES = 12
"""Bytes per parameter: its fp32 copy, and Adam's two moments."""
SMALL_FILES = 64 * 2**20
"""Bytes allowed for the other files of a checkpoint: the tokenizer, NeMo's context, indices."""


class NoRoomError(OSError):
    """The disk cannot take a checkpoint; earlier checkpoints are intact."""


def expected_size(trainer: pl.Trainer) -> int:
    """Return the bytes of a checkpoint on all ranks together, before one was written; every rank calls."""
    trained = [parameter for parameter in trainer.strategy.megatron_parallel.parameters() if parameter.requires_grad]
    rank_bytes = sum(parameter.numel() * (parameter.element_size() + ADAM_BYTES) for parameter in trained)
    total = torch.tensor(float(rank_bytes), device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total) // parallel_state.get_data_parallel_world_size() + SMALL_FILES


def require_room(directory: Path, needed: int) -> None:
    """Raise NoRoomError if fewer bytes than ``needed`` are free."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        what = f"a checkpoint takes {decimal(needed, precision=2)} and {decimal(free, precision=2)} are free"
        raise NoRoomError(errno.ENOSPC, what, str(directory))


def describe_save_error(error: BaseException, directory: Path) -> tuple[str, FailureKind]:
    """Return the reason and kind of a failed save, for every rank. Torch wraps errors, so the disk is checked too."""
    text = " ".join(str(error).split())
    if LOST in text:
        what = "a process that wrote the checkpoint ended unexpectedly (out of memory?)"
        return what, FailureKind.rank_lost
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text
    with suppress(OSError):
        full = full or shutil.disk_usage(directory).free < (size_of(directory) or 0)  # the writer's message differs
    if not full:
        return f"{type(error).__name__}: {text[:500]}", failure_kind_of(error)
    detail = error.strerror if isinstance(error, NoRoomError) else "the disk is full"
    return f"no room for a checkpoint in {directory}: {detail}. {NO_ROOM_ADVICE}", FailureKind.disk_full
