"""The reading of Megatron's distributed checkpoints slice by slice, from any parallel layout, without Megatron."""

from __future__ import annotations

import io
import itertools
import math
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from qwen_cl.config.errors import UserError
from qwen_cl.models.formats.torch_dist_metadata import DistributedMetadata, StoredChunk


class DistributedWeights:
    """The tensors of a ``torch_dist`` checkpoint by sharded key, with a count of the bytes read.

    Raises:
        UserError: It is not such a checkpoint, it is incomplete, or its metadata would run code.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bytes_read = 0
        self._metadata = DistributedMetadata(directory)

    @property
    def keys(self) -> set[str]:
        return self._metadata.keys

    def shape(self, key: str) -> tuple[int, ...]:
        return self._metadata.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._metadata.tensor(key).dtype)
        return dtype

    def read(self, key: str, layer: int | None) -> torch.Tensor:
        """Read a complete tensor, or one layer of a key that stacks layers along its first axis."""
        shape = self.shape(key)
        first, count = (0, shape[0]) if layer is None else (layer, 1)
        target = torch.empty([count, *shape[1:]], dtype=self.dtype(key))
        self.read_into(target, key, [first, *[0] * (len(shape) - 1)])
        return target if layer is None else target[0]

    def read_into(self, target: torch.Tensor, key: str, offsets: Sequence[int]) -> None:
        """Read the slice that begins at ``offsets`` and has the target's shape, and cast it to the target's dtype.

        Only the chunks that overlap the slice are read, one complete chunk at a time.
        """
        written: list[tuple[slice, ...]] = []
        for chunk in self._metadata.tensor(key).chunks:
            overlap = [
                (max(low, first), min(low + size, first + count))
                for low, size, first, count in zip(chunk.offsets, chunk.sizes, offsets, target.shape)
            ]
            if any(low >= high for low, high in overlap):
                continue
            source = tuple(slice(low - first, high - first) for (low, high), first in zip(overlap, chunk.offsets))
            destination = tuple(slice(low - first, high - first) for (low, high), first in zip(overlap, offsets))
            target[destination].copy_(self._load(key, chunk)[source])
            written.append(destination)
        self._check_coverage(key, written, target.numel())

    def _load(self, key: str, chunk: StoredChunk) -> torch.Tensor:
        """Load a chunk with torch's reader for tensors only, after verifying the checksums, which it ignores."""
        path = self.directory / chunk.file
        try:
            with path.open("rb") as stream:
                stream.seek(chunk.start)
                content = io.BytesIO(stream.read(chunk.length))
            with zipfile.ZipFile(content) as archive:
                if corrupted := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {corrupted} does not match")
            content.seek(0)
            tensor = torch.load(content, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: {key} cannot be read, the checkpoint is damaged: {reason}") from error
        if not isinstance(tensor, torch.Tensor) or tensor.shape != chunk.sizes or tensor.dtype != self.dtype(key):
            raise UserError(f"{path}: {key} does not have the shape or dtype in the checkpoint's metadata")
        self.bytes_read += chunk.length
        return tensor

    def _check_coverage(self, key: str, written: list[tuple[slice, ...]], wanted: int) -> None:
        """Check that the slices written do not overlap and add up to the target."""
        for one, other in itertools.combinations(written, 2):
            if all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other)):
                raise UserError(f"{self.directory}: two chunks of {key} overlap; the checkpoint is damaged")
        covered = sum(math.prod(part.stop - part.start for part in box) for box in written)
        if covered != wanted:
            raise UserError(f"{self.directory}: {key} is incomplete")
