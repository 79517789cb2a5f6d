"""Room on the disk for a checkpoint: looked for before, and what is said where there was none."""

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
"""Per parameter: its fp32 copy, and Adam's two moments."""
SMALL_FILES = 64 * 2**20
"""Bytes allowed for what else is in a checkpoint: the tokenizer, NeMo's context, indices."""


class NoRoomError(OSError):
    """The disk cannot take a checkpoint; earlier checkpoints are intact."""


def expected_size(trainer: pl.Trainer) -> int:
    """Bytes of a checkpoint on all ranks together, before there is one to measure; every rank calls."""
    trained = [parameter for parameter in trainer.strategy.megatron_parallel.parameters() if parameter.requires_grad]
    own = sum(parameter.numel() * (parameter.element_size() + ADAM_BYTES) for parameter in trained)
    total = torch.tensor(float(own), device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total) // parallel_state.get_data_parallel_world_size() + SMALL_FILES


def require_room(directory: Path, needed: int) -> None:
    """Raises NoRoomError where fewer bytes are free than ``needed``."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        what = f"a checkpoint takes {decimal(needed, precision=2)} and {decimal(free, precision=2)} are free"
        raise NoRoomError(errno.ENOSPC, what, str(directory))


def describe_save_error(error: BaseException, directory: Path) -> tuple[str, FailureKind]:
    """Return what went wrong, for every rank. Torch wraps what writing raises, so the disk is looked at too."""
    text = " ".join(str(error).split())
    if LOST in text:
        what = "a process that wrote the checkpoint ended before it was through; killed, for want of memory?"
        return what, FailureKind.rank_lost
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text
    with suppress(OSError):
        full = full or shutil.disk_usage(directory).free < (size_of(directory) or 0)  # its writer has words of its own
    if not full:
        return f"{type(error).__name__}: {text[:500]}", failure_kind_of(error)
    detail = error.strerror if isinstance(error, NoRoomError) else "the disk is full"
    return f"no room for a checkpoint in {directory}: {detail}. {NO_ROOM_ADVICE}", FailureKind.disk_full
