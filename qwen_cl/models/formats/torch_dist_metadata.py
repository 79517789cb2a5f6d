"""The ``.metadata`` of a distributed checkpoint: its tensors, their chunks and files. No torch.

torch reads this file with plain pickle, which runs code that the file names. Here every class it may name becomes an
inert record, so nothing is imported or called.
"""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError

METADATA = ".metadata"
_RECORDS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_DTYPE = re.compile(r"(bfloat|float|u?int|bool|complex)\w*")


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk of a tensor, saved by one rank: the content of torch.save inside a larger file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the checkpoint."""

    dtype: str
    """The dtype's name in torch, such as bfloat16."""
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


class DistributedMetadata:
    """The metadata of a ``torch_dist`` checkpoint's tensors, by sharded key.

    Raises:
        UserError: There is no metadata, it would run code, or it is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / METADATA
        try:
            with path.open("rb") as stream:
                metadata = _Unpickler(stream).load()
            self._records = {
                key: record for key, record in metadata.state_dict_metadata.items() if hasattr(record, "chunks")
            }
            if strange := [key for key in self._records if not (isinstance(key, str) and key.isprintable())]:
                raise ValueError(f"{strange[0]!r} is not a key")
            self._storage = {
                (index.fqn, tuple(index.offset)): info
                for index, info in metadata.storage_data.items()
                if hasattr(index, "offset")  # only tensors have offsets
            }
        except OSError as error:
            raise UserError(f"{path} cannot be read: there is no distributed checkpoint") from error
        except Exception as error:  # pickle may raise anything on a damaged file
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is not the metadata of a checkpoint: {reason}") from error
        self._tensors: dict[str, StoredTensor] = {}

    @property
    def keys(self) -> set[str]:
        return set(self._records)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.tensor(key).shape

    def tensor(self, key: str) -> StoredTensor:
        """Return a tensor's metadata.

        Raises:
            UserError: The chunks do not make up the tensor, or are not in their files.
        """
        if key not in self._records:
            raise UserError(f"{self.directory}: {key} is not in the checkpoint")
        if key not in self._tensors:
            try:
                self._tensors[key] = self._read(key)
            except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
                raise UserError(f"{self.directory / METADATA} is damaged: {key}: {error!r}") from error
        return self._tensors[key]

    def _read(self, key: str) -> StoredTensor:
        record = self._records[key]
        shape = _sizes(record.size)
        chunks = tuple(self._chunk(key, _sizes(chunk.offsets), _sizes(chunk.sizes), shape) for chunk in record.chunks)
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise UserError(f"{self.directory}: {key} is incomplete: its chunks do not make up its shape, {shape}")
        return StoredTensor(_dtype(record.properties), shape, chunks)

    def _chunk(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> StoredChunk:
        if not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"chunk {offsets} has another number of axes")
        if any(offset + size > length for offset, size, length in zip(offsets, sizes, shape)):
            raise ValueError(f"chunk {offsets} of {sizes} leaves the shape, {shape}")
        info = self._storage[key, offsets]
        name, (start, length) = info.relative_path, _sizes((info.offset, info.length))
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".distcp"):
            raise ValueError(f"file name {name!r} leaves the directory")
        if getattr(info, "transform_descriptors", None):
            raise ValueError("compressed checkpoints are not supported")
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {METADATA} names it, so the checkpoint is incomplete")
        if start + length > path.stat().st_size:
            raise UserError(f"{path} is shorter than {METADATA} says; the checkpoint is incomplete")
        return StoredChunk(offsets, sizes, name, start, length)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise ValueError(f"{values!r} are not sizes")
    return values


def _dtype(properties: Any) -> str:
    """Return the dtype of torch's TensorProperties, saved as a tuple with the dtype first; before 2.0, as a dict."""
    state = properties.state
    dtype = state["dtype"] if isinstance(state, dict) else state[0]
    if not isinstance(dtype, _Dtype):
        raise ValueError(f"{dtype!r} is not a dtype")
    return str(dtype)


class _Dtype(str):
    __slots__ = ()


class _Record:
    """The inert stand-in for any class of a checkpoint's metadata, which only stores its arguments."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name == "Size":
            return tuple
        if module == "torch" and _DTYPE.fullmatch(name):
            return _Dtype(name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module.startswith(_RECORDS) and "." not in name:
            return _Record
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
