"""A directory of safetensors as one mapping of names to slices. Torch only when a slice is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.source.architecture import Architecture
from qwen_cl.source.families import deliberately_unused, expected_shapes

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Those whose values are the weights. A quantized type would need its scales, which nothing here reads."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tensor's values lie, row by row."""

    path: Path
    offset: int
    """Of the first byte, in the file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: BF16, F32."""


class Checkpoint:
    """The tensors of a Hugging Face directory, by name; counts the bytes of them that are read.

    Raises:
        UserError: no safetensors, or the files and their index disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.bytes_read = 0
        self._locations: dict[str, Location] = {}
        for path in weight_files(directory):
            for name, location in _read_header(path).items():
                if name in self._locations:
                    raise UserError(f"{path}: tensor {name} is in another file of {directory} too")
                self._locations[name] = location

    @property
    def names(self) -> set[str]:
        return set(self._locations)

    def location(self, name: str) -> Location:
        return self._locations[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._locations[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._slice(name)[:0].dtype

    def read(self, name: str, *slices: slice) -> torch.Tensor:
        """Only the slice's bytes are read, mapped from the file; a whole model is what ``reading`` is for."""
        tensor: torch.Tensor = self._slice(name)[slices if len(slices) > 1 else slices[0]]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _slice(self, name: str) -> Any:
        from safetensors import safe_open

        handle: Any = safe_open(str(self._locations[name].path), framework="pt")
        return handle.get_slice(name)


def _read_header(path: Path) -> dict[str, Location]:
    """safetensors checks the header and that the file is as long as it says; it does not tell where tensors lie."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"), path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    return {
        name: Location(path, 8 + length + field["data_offsets"][0], tuple(field["shape"]), field["dtype"])
        for name, field in header.items()
        if name != "__metadata__"
    }


def weight_files(directory: Path) -> list[Path]:
    """The files the index names, or the single file there is."""
    index = directory / INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.gguf") for path in directory.glob(pattern))
            found = f" (found {', '.join(others[:3])})" if others else ""
            raise UserError(f"{directory} holds no *.safetensors{found}; weights are read from safetensors only")
        return files
    named = indexed_files(index)
    for name in named:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; {INDEX} names it, so the download is not whole")
    return [directory / name for name in named]


def indexed_files(index: Path) -> list[str]:
    """The names of the files an index lists.

    Raises:
        UserError: it is no index, or names a file of another directory or another kind.
    """
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not a safetensors index: {error!r}") from error
    for name in sorted(named, key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: file name {name!r} leaves the directory")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name} is not a safetensors file, and no other kind is read")
    return sorted(named)


def check_tensors(directory: Path, architecture: Architecture) -> None:
    """Compare the headers with what the architecture needs, before anything heavy starts.

    Raises:
        UserError: a tensor is missing, of another shape, or there though nothing would use it.
    """
    checkpoint = Checkpoint(directory)
    found, expected = checkpoint.names, expected_shapes(architecture)
    if missing := sorted(expected.keys() - found):
        raise UserError(f"{directory}: its safetensors lack {_some(missing)}, which config.json calls for")
    unknown = sorted(name for name in found - expected.keys() if not deliberately_unused(name, architecture))
    if unknown:
        raise UserError(f"{directory}: its safetensors hold {_some(unknown)}, which no layer of this model uses")
    # A slice of a larger tensor can be read, so nothing later would notice.
    for name, shape in expected.items():
        if (actual := checkpoint.shape(name)) != shape:
            raise UserError(f"{directory}: tensor {name} has shape {actual} where config.json calls for {shape}")
        if (dtype := checkpoint.location(name).dtype) not in DTYPES:
            raise UserError(
                f"{directory}: tensor {name} is {dtype}; weights must be {', '.join(DTYPES)}: use the model that "
                "this one was quantized from"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
