"""The open files, blocks of rows and staging buffers between safetensors and live tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_cl.config.errors import UserError

BLOCK = 4 * 2**20
"""Bytes read at a time: enough to amortize a system call, and few enough to fit in the CPU's caches."""
PINNED_BLOCK = 16 * 2**20
"""Most bytes read at a time for a GPU, where each block costs more: 24 GB/s instead of the 15 GB/s of 4 MiB (H200, 7B,
8 readers). Pinning takes time per byte, so a small model has smaller blocks."""
MIN_PINNED_BLOCK = 2 * 2**20
MIN_PINNED_BLOCKS = 128
"""The number of pinned blocks that the bytes of a model are divided into at least."""
BUFFERS = 2
"""Buffers of each reader: one is filled from the file while the other is copied to the device."""
CAST = 32768
"""Elements cast at a time on a CPU; for more, torch would start a thread pool in each reader."""


def block_size(device: torch.device, total: int) -> int:
    """Return the block size for reading ``total`` bytes to a device."""
    if device.type != "cuda":
        return BLOCK
    return min(PINNED_BLOCK, max(MIN_PINNED_BLOCK, total // MIN_PINNED_BLOCKS))


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of one tensor that are read at once: ``row_bytes`` at ``offset`` and then every ``stride`` bytes."""

    destination: torch.Tensor
    dtype: torch.dtype
    """The dtype in the file."""
    path: Path
    offset: int
    row_bytes: int
    stride: int

    @property
    def rows(self) -> int:
        return self.destination.shape[0]

    @property
    def size(self) -> int:
        return self.rows * self.row_bytes

    def split(self, max_bytes: int) -> Iterator[Block]:
        """Split into blocks of at most ``max_bytes``, and at least one row each."""
        step = max(1, max_bytes // self.row_bytes)
        for first in range(0, self.rows, step):
            rows, offset = self.destination[first : first + step], self.offset + first * self.stride
            yield Block(rows, self.dtype, self.path, offset, self.row_bytes, self.stride)


class Ring:
    """The staging buffers of one reader, used in turn: a buffer is reused once its copy to the device is done."""

    def __init__(self, device: torch.device, block_bytes: int) -> None:
        self.device = device
        self.block_bytes = block_bytes
        self.cuda = device.type == "cuda"
        self._buffers: list[torch.Tensor | None] = [None] * BUFFERS
        event: Any = torch.cuda.Event
        self._sent = [event(blocking=True) for _ in range(BUFFERS)] if self.cuda else []
        self._on_device: torch.Tensor | None = None
        self._turn = 0

    @contextlib.contextmanager
    def buffer(self, size: int) -> Iterator[torch.Tensor]:
        """Yield a buffer of ``size`` bytes, to be filled and sent within the context."""
        turn, self._turn = self._turn, (self._turn + 1) % BUFFERS
        if self.cuda:
            self._sent[turn].synchronize()
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < size:
            self._buffers[turn] = buffer = torch.empty(
                max(size, self.block_bytes), dtype=torch.uint8, pin_memory=self.cuda
            )
        yield buffer[:size]
        if self.cuda:
            self._sent[turn].record()

    def send(self, staged: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy to the device without conversion, and cast there."""
        if not self.cuda:
            chunks: Any = torch.split
            for target, source in zip(chunks(destination.view(-1), CAST), chunks(staged.view(-1), CAST)):
                target.copy_(source)
            return
        if staged.dtype is not destination.dtype:
            raw = staged.view(-1).view(torch.uint8)
            if self._on_device is None or len(self._on_device) < len(raw):
                self._on_device = torch.empty(max(len(raw), self.block_bytes), dtype=torch.uint8, device=self.device)
            target = self._on_device[: len(raw)]  # one is enough, as a stream executes in order
            target.copy_(raw, non_blocking=True)
            staged = target.view(staged.dtype).view(staged.shape)
        destination.copy_(staged, non_blocking=True)


class OpenFiles:
    """The open files, which all threads read by offset."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> OpenFiles:
        try:
            for path in self._paths:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
        except OSError as error:
            self.__exit__()
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, block: Block, target: torch.Tensor) -> None:
        """Read exactly the block's bytes into ``target``, contiguous bytes on the CPU."""
        memory = target.numpy().data
        if block.row_bytes == block.stride or block.rows == 1:
            self._read_at(block, block.offset, memory)
            return
        if hasattr(os, "posix_fadvise"):  # the kernel cannot predict this access pattern; macOS has no such call
            size = block.rows * block.stride
            os.posix_fadvise(self._descriptors[block.path], block.offset, size, os.POSIX_FADV_WILLNEED)
        for row in range(block.rows):
            part = memory[row * block.row_bytes : (row + 1) * block.row_bytes]
            self._read_at(block, block.offset + row * block.stride, part)

    def _read_at(self, block: Block, offset: int, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._descriptors[block.path], [memory[done:]], offset + done)
            except OSError as error:
                where = f"at byte {offset + done}: {error.strerror}"
                raise UserError(f"{block.path} cannot be read {where}; check the disk, or download it again") from error
            if count == 0:
                size = os.fstat(self._descriptors[block.path]).st_size
                raise UserError(
                    f"{block.path} became shorter than its header says ({size} bytes) after the run began; "
                    "download it again"
                )
            done += count
