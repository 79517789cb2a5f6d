"""The threads that read slices of safetensors into live tensors, for a GPU through pinned buffers.

A CPU tensor of the file's dtype is read into directly. Everything else passes through small staging buffers, so the
host memory beyond the tensors does not grow with the model. Files are read and never mapped: their pages do not count
as memory of the process, and a failing disk raises an error instead of SIGBUS.
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

MAX_READERS = 8
BYTES_PER_READER = 256 * 2**20
"""Fewest bytes per reader for a GPU; with less to read, another reader's pinned buffers cost more than they save."""
INTERVAL = 0.25
"""Seconds between two reports of progress."""

LoadProgress = Callable[[int, int], None]
"""The callback for the bytes read so far and the total, called from the calling thread and always once at the end."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A slice to read: ``destination``, contiguous, receives rows and columns of the tensor from the first ones on."""

    destination: torch.Tensor
    tensor: str
    first_row: int = 0
    first_column: int = 0


def read_into(
    copies: Sequence[Copy], checkpoint: Checkpoint, *, readers: int | None = None, progress: LoadProgress | None = None
) -> None:
    """Read all copies, to destinations on the CPU and at most one GPU (NeMo moves some parameters there only later).

    Raises:
        UserError: A file cannot be read or is shorter than its header says.
    """
    unsplit = list(_blocks(copies, checkpoint))
    if not unsplit:
        return
    total = sum(block.size for block in unsplit)
    device = max((block.destination.device for block in unsplit), key=lambda device: device.type == "cuda")
    blocks = [part for block in unsplit for part in block.split(block_size(block.destination.device, total))]
    blocks.sort(key=lambda block: (block.path, block.offset))
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # wait for the kernels that initialize the destinations
    count = min(readers or default_readers(device, total), len(blocks))
    with OpenFiles(sorted({block.path for block in blocks})) as files:
        work = deque(blocks)
        tasks = [_Reader(work, files, device, block_size(device, total)) for _ in range(count)]
        try:
            _run(tasks, total, progress)
        finally:
            checkpoint.bytes_read += sum(task.bytes_read for task in tasks)


def default_readers(device: torch.device, total: int) -> int:
    """Return the number of readers: this rank's share of the node's CPUs, at least two to overlap disk waits."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    useful = math.ceil(total / BYTES_PER_READER) if device.type == "cuda" else MAX_READERS
    return max(2, min(MAX_READERS, useful, _cpus() // ranks))


def _cpus() -> int:
    import psutil

    process = psutil.Process()
    return (
        len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1
    )  # macOS has no affinity


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
            tasks[0].work.clear()  # the pool waits for its threads, which stop after their current block
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
    """The work of one thread: it takes blocks from the queue until it is empty."""

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
