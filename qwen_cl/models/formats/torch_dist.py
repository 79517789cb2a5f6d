"""Megatron's distributed checkpoints read slice by slice, whatever layout wrote them, without Megatron."""

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
from qwen_cl.models.formats.torch_dist_metadata import DistributedMetadata, StoredPiece


class DistributedWeights:
    """The tensors of a ``torch_dist`` checkpoint, by sharded key; counts the bytes it reads.

    Raises:
        UserError: it is not one, it is not whole, or its metadata would run code.
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
        """The whole tensor, or one layer of a key that stacks them along its first axis."""
        shape = self.shape(key)
        first, count = (0, shape[0]) if layer is None else (layer, 1)
        target = torch.empty([count, *shape[1:]], dtype=self.dtype(key))
        self.read_into(target, key, [first, *[0] * (len(shape) - 1)])
        return target if layer is None else target[0]

    def read_into(self, target: torch.Tensor, key: str, offsets: Sequence[int]) -> None:
        """The slice that begins at ``offsets`` and has the target's shape, in the target's dtype.

        Only the pieces that the slice touches are read, one at a time, each of them whole.
        """
        written: list[tuple[slice, ...]] = []
        for piece in self._metadata.tensor(key).pieces:
            overlap = [
                (max(low, first), min(low + size, first + count))
                for low, size, first, count in zip(piece.offsets, piece.sizes, offsets, target.shape)
            ]
            if any(low >= high for low, high in overlap):
                continue
            there = tuple(slice(low - first, high - first) for (low, high), first in zip(overlap, piece.offsets))
            here = tuple(slice(low - first, high - first) for (low, high), first in zip(overlap, offsets))
            target[here].copy_(self._load(key, piece)[there])
            written.append(here)
        self._check_coverage(key, written, target.numel())

    def _load(self, key: str, piece: StoredPiece) -> torch.Tensor:
        """Torch's own reader, which unpickles nothing but tensors; it does not look at the checksums torch wrote."""
        path = self.directory / piece.file
        try:
            with path.open("rb") as stream:
                stream.seek(piece.start)
                content = io.BytesIO(stream.read(piece.length))
            with zipfile.ZipFile(content) as archive:
                if spoilt := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {spoilt} does not fit")
            content.seek(0)
            tensor = torch.load(content, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: {key} cannot be read, the checkpoint is damaged: {reason}") from error
        if not isinstance(tensor, torch.Tensor) or tensor.shape != piece.sizes or tensor.dtype != self.dtype(key):
            raise UserError(f"{path}: {key} is another tensor than the checkpoint's metadata says")
        self.bytes_read += piece.length
        return tensor

    def _check_coverage(self, key: str, written: list[tuple[slice, ...]], wanted: int) -> None:
        """Boxes that do not meet and add up to the target are the target."""
        for one, other in itertools.combinations(written, 2):
            if all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other)):
                raise UserError(f"{self.directory}: two pieces of {key} overlap; the checkpoint is damaged")
        covered = sum(math.prod(part.stop - part.start for part in box) for box in written)
        if covered != wanted:
            raise UserError(f"{self.directory}: {key} is not whole")
