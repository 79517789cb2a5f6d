"""Copies slices of safetensors into live tensors: threads read, and a GPU is fed through pinned buffers.

A CPU tensor of the file's dtype is read into directly. Everything else passes through small staging buffers, so that
host memory beyond the tensors themselves stays the same whatever the size of the model. Files are read and never
mapped: what has been read does not stay in the process, and a failing disk is an error and no SIGBUS.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_cl.config.errors import UserError
from qwen_cl.source.checkpoint import DTYPES, Checkpoint

BLOCK = 4 * 2**20
"""Bytes read at a time: far more than a system call costs, far less than a cache of the CPU that others need."""
BUFFERS = 2
"""Of each reader: one is filled from the file while the other travels to the device."""
CAST = 32768
"""Elements cast at a time on a CPU: torch would start a team of threads, in each reader, for more."""
MOST_READERS = 8
INTERVAL = 0.25
"""Seconds between two reports of progress."""

Progress = Callable[[int, int], None]
"""Told the bytes read so far and the bytes there are, by the calling thread; always once at the end."""


@dataclass(frozen=True, slots=True)
class Copy:
    """``destination``, contiguous, takes as many rows and columns as it has, from these on; and the file's values."""

    destination: torch.Tensor
    tensor: str
    first_row: int = 0
    first_column: int = 0


def read_into(
    copies: Sequence[Copy], checkpoint: Checkpoint, *, readers: int | None = None, progress: Progress | None = None
) -> None:
    """Returns when every byte is in place. Destinations may be on the CPU and on one GPU: what NeMo moves there late.

    Raises:
        UserError: a file cannot be read or is shorter than its header says.
    """
    blocks = sorted(_blocks(copies, checkpoint), key=lambda block: (block.path, block.offset))
    if not blocks:
        return
    device = max((block.destination.device for block in blocks), key=lambda device: device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # what made the destinations is done with them
    count = min(readers or default_readers(), len(blocks))
    with _Files(sorted({block.path for block in blocks})) as files:
        work = deque(blocks)
        tasks = [_Reader(work, files, device) for _ in range(count)]
        try:
            _run(tasks, sum(block.size for block in blocks), progress)
        finally:
            checkpoint.bytes_read += sum(task.bytes_read for task in tasks)


def default_readers() -> int:
    """The CPUs this process may use, shared with the other ranks of the node; never one, which would wait on a disk."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(2, min(MOST_READERS, _cpus() // ranks))


def _cpus() -> int:
    import psutil

    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1  # not on a Mac


def _run(tasks: list[_Reader], total: int, progress: Progress | None) -> None:
    with ThreadPoolExecutor(len(tasks), thread_name_prefix="weights") as pool:
        pending = {pool.submit(task.run) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, timeout=INTERVAL, return_when=FIRST_EXCEPTION)
                for task in done:
                    task.result()
                if pending and progress is not None:
                    progress(sum(task.bytes_read for task in tasks), total)
        except BaseException:
            tasks[0].work.clear()  # the pool waits for its threads, and they stop after the block they are at
            raise
    if progress is not None:
        progress(total, total)


@dataclass(frozen=True, slots=True)
class _Block:
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

    def split(self, most_bytes: int) -> Iterator[_Block]:
        """In blocks of at most so many bytes, and at least one row."""
        step = max(1, most_bytes // self.row_bytes)
        for first in range(0, self.rows, step):
            rows, offset = self.destination[first : first + step], self.offset + first * self.stride
            yield _Block(rows, self.dtype, self.path, offset, self.row_bytes, self.stride)


def _blocks(copies: Sequence[Copy], checkpoint: Checkpoint) -> Iterator[_Block]:
    for copy in copies:
        if copy.destination.numel() == 0:
            continue
        location = checkpoint.location(copy.tensor)
        dtype = getattr(torch, DTYPES[location.dtype])
        shape, wanted = location.shape, tuple(copy.destination.shape)
        inside = len(shape) == len(wanted) and copy.first_row + wanted[0] <= shape[0]
        if len(shape) > 1:
            inside = inside and copy.first_column + wanted[1] <= shape[1] and wanted[2:] == shape[2:]
        if not (inside and copy.destination.is_contiguous()):
            raise ValueError(f"{copy.tensor} has shape {shape}, which does not hold {wanted} from {copy.first_row}")
        stride = math.prod(shape[1:]) * dtype.itemsize
        offset = location.offset + copy.first_row * stride
        if len(shape) > 1:
            offset += copy.first_column * math.prod(shape[2:]) * dtype.itemsize
        row_bytes = math.prod(wanted[1:]) * dtype.itemsize
        yield from _Block(copy.destination, dtype, location.path, offset, row_bytes, stride).split(BLOCK)


class _Reader:
    """One thread's share: takes blocks until there are none."""

    def __init__(self, work: deque[_Block], files: _Files, device: torch.device) -> None:
        self.work, self.files, self.device = work, files, device
        self.bytes_read = 0

    def run(self) -> None:
        rings = {device: Ring(device) for device in {self.device, torch.device("cpu")}}
        make: Any = torch.cuda.Stream
        stream = make(self.device) if self.device.type == "cuda" else None
        with torch.no_grad(), torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            while True:
                try:
                    block = self.work.popleft()
                except IndexError:
                    break
                self._read(block, rings[block.destination.device])
        if stream is not None:
            stream.synchronize()

    def _read(self, block: _Block, ring: Ring) -> None:
        if block.destination.device.type == "cpu" and block.destination.dtype is block.dtype:
            self.files.read(block, block.destination.view(-1).view(torch.uint8))
            self.bytes_read += block.size
            return
        with ring.buffer(block.size) as staged:
            self.files.read(block, staged)
            ring.send(staged.view(block.dtype).view(block.destination.shape), block.destination)
        self.bytes_read += block.size


class Ring:
    """The staging buffers of one reader, used in turn: a buffer is written again when its copy has left it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
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
            self._buffers[turn] = buffer = torch.empty(max(size, BLOCK), dtype=torch.uint8, pin_memory=self.cuda)
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
                self._on_device = torch.empty(max(len(raw), BLOCK), dtype=torch.uint8, device=self.device)
            there = self._on_device[: len(raw)]  # one is enough: a stream does its work in order
            there.copy_(raw, non_blocking=True)
            staged = there.view(staged.dtype).view(staged.shape)
        destination.copy_(staged, non_blocking=True)


class _Files:
    """Open files that any thread may read, each read at its own place."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> _Files:
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

    def read(self, block: _Block, target: torch.Tensor) -> None:
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

    def _read_at(self, block: _Block, offset: int, memory: memoryview) -> None:
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
