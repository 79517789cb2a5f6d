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
from typing import Any

import torch

from qwen_cl.models.formats.safetensors import Checkpoint
from qwen_cl.models.formats.tensor_files import DTYPES
from qwen_cl.models.loading.buffers import Block, OpenFiles, Ring, block_size

MOST_READERS = 8
BYTES_PER_READER = 256 * 2**20
"""On the way to a GPU: another reader pays for its pinned buffers with at least so much to read."""
INTERVAL = 0.25
"""Seconds between two reports of progress."""

LoadProgress = Callable[[int, int], None]
"""Told the bytes read so far and the bytes there are, by the calling thread; always once at the end."""


@dataclass(frozen=True, slots=True)
class Copy:
    """``destination``, contiguous, takes as many rows and columns as it has, from these on; and the file's values."""

    destination: torch.Tensor
    tensor: str
    first_row: int = 0
    first_column: int = 0


def read_into(
    copies: Sequence[Copy], checkpoint: Checkpoint, *, readers: int | None = None, progress: LoadProgress | None = None
) -> None:
    """Returns when every byte is in place. Destinations may be on the CPU and on one GPU: what NeMo moves there late.

    Raises:
        UserError: a file cannot be read or is shorter than its header says.
    """
    whole = list(_blocks(copies, checkpoint))
    if not whole:
        return
    total = sum(block.size for block in whole)
    device = max((block.destination.device for block in whole), key=lambda device: device.type == "cuda")
    blocks = [part for block in whole for part in block.split(block_size(block.destination.device, total))]
    blocks.sort(key=lambda block: (block.path, block.offset))
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # what made the destinations is done with them
    count = min(readers or default_readers(device, total), len(blocks))
    with OpenFiles(sorted({block.path for block in blocks})) as files:
        work = deque(blocks)
        tasks = [_Reader(work, files, device, block_size(device, total)) for _ in range(count)]
        try:
            _run(tasks, total, progress)
        finally:
            checkpoint.bytes_read += sum(task.bytes_read for task in tasks)


def default_readers(device: torch.device, total: int) -> int:
    """The CPUs this process may use, shared with the other ranks of the node; never one, which would wait on a disk."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    useful = math.ceil(total / BYTES_PER_READER) if device.type == "cuda" else MOST_READERS
    return max(2, min(MOST_READERS, useful, _cpus() // ranks))


def _cpus() -> int:
    import psutil

    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1  # not on a Mac


def _run(tasks: list[_Reader], total: int, progress: LoadProgress | None) -> None:
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


def _blocks(copies: Sequence[Copy], checkpoint: Checkpoint) -> Iterator[Block]:
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
        yield Block(copy.destination, dtype, location.path, offset, row_bytes, stride)


class _Reader:
    """One thread's share: takes blocks until there are none."""

    def __init__(self, work: deque[Block], files: OpenFiles, device: torch.device, block_bytes: int) -> None:
        self.work, self.files, self.device, self.block_bytes = work, files, device, block_bytes
        self.bytes_read = 0

    def run(self) -> None:
        rings = {device: Ring(device, self.block_bytes) for device in {self.device, torch.device("cpu")}}
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

    def _read(self, block: Block, ring: Ring) -> None:
        if block.destination.device.type == "cpu" and block.destination.dtype is block.dtype:
            self.files.read(block, block.destination.view(-1).view(torch.uint8))
            self.bytes_read += block.size
            return
        with ring.buffer(block.size) as staged:
            self.files.read(block, staged)
            ring.send(staged.view(block.dtype).view(block.destination.shape), block.destination)
        self.bytes_read += block.size
