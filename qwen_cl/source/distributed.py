"""Megatron's distributed checkpoints read tensor by tensor, whatever layout wrote them, without Megatron."""

from __future__ import annotations

import enum
import pickle
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from qwen_cl.config.errors import UserError

METADATA = ".metadata"
# Megatron's two subclasses only add fields, which stay readable on torch's own classes.
STAND_INS = {"MCoreMetadata": Metadata, "MCoreSavePlan": SavePlan}
PLAIN = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


class DistributedWeights:
    """The tensors of a ``torch_dist`` checkpoint, by sharded key.

    Raises:
        UserError: it is not one, it is not whole, or its metadata would run code.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            with (directory / METADATA).open("rb") as stream:
                metadata = _SafeUnpickler(stream).load()
        except OSError as error:
            raise UserError(f"{directory / METADATA} cannot be read: no distributed checkpoint is there") from error
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError) as error:
            raise UserError(f"{directory / METADATA} is not the metadata of a checkpoint: {error}") from error
        self._reader = FileSystemReader(directory)
        self._reader.storage_data = metadata.storage_data
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    @property
    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, key: str, layer: int | None) -> torch.Tensor:
        """The whole tensor, or one layer of a key that stacks them along its first axis."""
        stored = self._tensors[key]
        first, count = (0, stored.size[0]) if layer is None else (layer, 1)
        offsets = torch.Size([first, *[0] * (len(stored.size) - 1)])
        target = torch.empty([count, *stored.size[1:]], dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(offsets, target.size())
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.directory}: {key} cannot be read, the checkpoint is not whole: {error}") from error
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise UserError(f"{self.directory}: {key} is not whole")
        return target if layer is None else target[0]


class _Into(DefaultLoadPlanner):
    """The part of a LoadPlanner that FileSystemReader asks for."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, item: Any) -> torch.Tensor:
        slices = tuple(slice(start, start + size) for start, size in zip(item.dest_offsets, item.lengths))
        return self.target[slices]

    def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
        pass


class _SafeUnpickler(pickle.Unpickler):
    """Only what describes a checkpoint: torch reads this file with plain pickle, which would run what it names."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in STAND_INS:
            return STAND_INS[name]
        if (module, name) in PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("torch.distributed.checkpoint."):
            found = super().find_class(module, name)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
