"""What a distributed checkpoint's ``.metadata`` says: which tensors, in which pieces, in which files. No torch.

torch reads this file with plain pickle, which runs what the file names. Here every class it may name becomes an inert
record, so nothing is imported, let alone called.
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
class StoredPiece:
    """One rank's part of a tensor: a file of its own (torch.save's) inside a larger one."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    dtype: str
    """torch's name for it, such as bfloat16."""
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


class DistributedMetadata:
    """The tensors of a ``torch_dist`` checkpoint, by sharded key.

    Raises:
        UserError: there is none, it would run code, or it is damaged.
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
                raise ValueError(f"{strange[0]!r} is no key")
            self._storage = {
                (index.fqn, tuple(index.offset)): info
                for index, info in metadata.storage_data.items()
                if hasattr(index, "offset")  # else it is no tensor
            }
        except OSError as error:
            raise UserError(f"{path} cannot be read: no distributed checkpoint is there") from error
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
        """Raises UserError if the pieces do not make up the tensor, or are not in their files."""
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
        pieces = tuple(self._piece(key, _sizes(chunk.offsets), _sizes(chunk.sizes), shape) for chunk in record.chunks)
        if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
            raise UserError(f"{self.directory}: {key} is not whole: its pieces are not its shape, {shape}")
        return StoredTensor(_dtype(record.properties), shape, pieces)

    def _piece(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> StoredPiece:
        if not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"piece {offsets} has another number of axes")
        if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape)):
            raise ValueError(f"piece {offsets} of {sizes} leaves the shape, {shape}")
        info = self._storage[key, offsets]
        name, (start, length) = info.relative_path, _sizes((info.offset, info.length))
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".distcp"):
            raise ValueError(f"file name {name!r} leaves the directory")
        if getattr(info, "transform_descriptors", None):
            raise ValueError("compressed checkpoints are not supported")
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {METADATA} names it, so the checkpoint is not whole")
        if start + length > path.stat().st_size:
            raise UserError(f"{path} is shorter than {METADATA} says; the checkpoint is not whole")
        return StoredPiece(offsets, sizes, name, start, length)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return values


def _dtype(properties: Any) -> str:
    """torch writes TensorProperties as a tuple with the dtype first; before 2.0, as a dict."""
    state = properties.state
    dtype = state["dtype"] if isinstance(state, dict) else state[0]
    if not isinstance(dtype, _Dtype):
        raise ValueError(f"{dtype!r} is no dtype")
    return str(dtype)


class _Dtype(str):
    __slots__ = ()


class _Record:
    """Stands for any class of a checkpoint's metadata: keeps what it is given and does nothing."""

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
