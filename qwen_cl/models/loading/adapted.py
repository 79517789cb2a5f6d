"""The base's tensors with ``model.adapter`` merged in, for everything that reads a base's weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open

from qwen_cl.models.adapter_methods import lora_update
from qwen_cl.models.formats.tensor_files import Location
from qwen_cl.models.loading.base_adapter import BaseAdapter, Factors

if TYPE_CHECKING:
    from qwen_cl.models.loading.readers import Copy

ROWS = 4096
"""Rows merged at a time, to bound host memory."""


class Tensors(Protocol):
    """The tensors of a model by Hugging Face name."""

    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, *slices: slice) -> torch.Tensor: ...


class AdaptedTensors:
    """The tensors of a base with an adapter merged in: changed ones are read in fp32; ``dtype`` is the base's."""

    def __init__(self, base: Tensors, adapter: BaseAdapter) -> None:
        self._base, self._adapter = base, adapter

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def read(self, name: str, *slices: slice) -> torch.Tensor:
        weight = self._base.read(name, *slices)
        factors = self._adapter.factors.get(name)
        if factors is None:
            return weight
        rows, columns = (*slices, slice(None), slice(None))[:2]
        up, down = _read(factors.up, rows, slice(None)), _read(factors.down, slice(None), columns)
        return weight.float() + lora_update(up, down, factors.scale)


def read_factors(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the complete factors down (rank, columns) and up (rows, rank), in fp32."""
    everything = slice(None)
    return _read(factors.down, everything, everything).float(), _read(factors.up, everything, everything).float()


def copy_adapted(copies: Iterable[Copy], base: Tensors, adapter: BaseAdapter) -> None:
    """Fill the destinations with the slices of the weights that the adapter changes."""
    tensors = AdaptedTensors(base, adapter)
    for copy in copies:
        count, width = copy.destination.shape
        columns = slice(copy.first_column, copy.first_column + width)
        for start in range(0, count, ROWS):
            stop = min(start + ROWS, count)
            rows = slice(copy.first_row + start, copy.first_row + stop)
            copy.destination[start:stop].copy_(tensors.read(copy.tensor, rows, columns))


def _read(location: Location, rows: slice, columns: slice) -> torch.Tensor:
    with safe_open(str(location.path), framework="pt") as stream:
        tensor: torch.Tensor = stream.get_slice(location.name)[rows, columns]
    return tensor
