"""A directory of safetensors as one mapping of names to slices. Torch only when a slice is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.source.architecture import Architecture
from qwen_cl.source.families import deliberately_unused, expected_shapes

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a Hugging Face directory, by name; counts the bytes it reads.

    Raises:
        UserError: no safetensors, or the files and their index disagree.
    """

    def __init__(self, directory: Path, *, framework: str = "pt") -> None:
        from safetensors import SafetensorError, safe_open

        self.bytes_read = 0
        self._handles: dict[str, Any] = {}
        for path in weight_files(directory):
            try:
                handle: Any = safe_open(str(path), framework=framework)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a readable safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                if name in self._handles:
                    raise UserError(f"{path}: tensor {name} is in another file of {directory} too")
                self._handles[name] = handle

    @property
    def names(self) -> set[str]:
        return set(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return self._handles[name].get_slice(name)[:0].dtype

    def read(self, name: str, *slices: slice) -> torch.Tensor:
        """Only the slice's bytes are read from the file."""
        tensor: torch.Tensor = self._handles[name].get_slice(name)[slices if len(slices) > 1 else slices[0]]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor


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
    checkpoint = Checkpoint(directory, framework="np")
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
