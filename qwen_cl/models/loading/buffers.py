"""Where bytes wait between a file and a tensor: open files, blocks of rows, and the buffers they are staged in."""

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
"""Bytes read at a time: far more than a system call costs, far less than a cache of the CPU that others need."""
PINNED_BLOCK = 16 * 2**20
"""At most the same on the way to a GPU, where a block costs more: on an H200, 7B, 8 readers, 24 GB/s where 4 MiB gave
15. Pinning costs time by the byte, so that a small model has smaller ones."""
LEAST_PINNED_BLOCK = 2 * 2**20
PINNED_SHARE = 128
"""A pinned block holds at most one part in so many of what is read."""
BUFFERS = 2
"""Of each reader: one is filled from the file while the other travels to the device."""
CAST = 32768
"""Elements cast at a time on a CPU: torch would start a team of threads, in each reader, for more."""


def block_size(device: torch.device, total: int) -> int:
    """For a model of ``total`` bytes."""
    if device.type != "cuda":
        return BLOCK
    return min(PINNED_BLOCK, max(LEAST_PINNED_BLOCK, total // PINNED_SHARE))


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one tensor that are read at once: ``row_bytes`` at ``offset`` and then every ``stride`` bytes."""

    destination: torch.Tensor
    dtype: torch.dtype
    """The file's."""
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

    def split(self, most_bytes: int) -> Iterator[Block]:
        """In blocks of at most so many bytes, and at least one row."""
        step = max(1, most_bytes // self.row_bytes)
        for first in range(0, self.rows, step):
            rows, offset = self.destination[first : first + step], self.offset + first * self.stride
            yield Block(rows, self.dtype, self.path, offset, self.row_bytes, self.stride)


class Ring:
    """The staging buffers of one reader, used in turn: a buffer is written again when its copy has left it."""

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
        """``size`` bytes to fill and send before the block ends."""
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
        """To the device as it is, and cast there."""
        if not self.cuda:
            chunks: Any = torch.split
            for there, here in zip(chunks(destination.view(-1), CAST), chunks(staged.view(-1), CAST)):
                there.copy_(here)
            return
        if staged.dtype is not destination.dtype:
            raw = staged.view(-1).view(torch.uint8)
            if self._on_device is None or len(self._on_device) < len(raw):
                self._on_device = torch.empty(max(len(raw), self.block_bytes), dtype=torch.uint8, device=self.device)
            there = self._on_device[: len(raw)]  # one is enough: a stream does its work in order
            there.copy_(raw, non_blocking=True)
            staged = there.view(staged.dtype).view(staged.shape)
        destination.copy_(staged, non_blocking=True)


class OpenFiles:
    """Open files that any thread may read, each read at its own place."""

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
        """Into ``target``, contiguous bytes on the CPU; not one byte beside the block's own is asked for."""
        memory = target.numpy().data
        if block.row_bytes == block.stride or block.rows == 1:
            self._read_at(block, block.offset, memory)
            return
        if hasattr(os, "posix_fadvise"):  # the system cannot guess such a pattern; a Mac cannot be told
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
                    f"{block.path} has become shorter than its header says ({size} bytes) since the run began; "
                    "download it again"
                )
            done += count
