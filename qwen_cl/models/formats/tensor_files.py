"""The safetensors files of a model's directory, their tensors and where each lies. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
"""The pattern of save_pretrained's names for the files that an index lists."""
ADAPTER_CONFIG = "adapter_config.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""The supported dtypes. Quantized ones would need their scales, which are not read here."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "model."
"""The prefix of all tensors but the output layer's; models saved without that layer (AutoModel) omit it."""
ADAPTER_FIX = "give its base, and the adapter beside it: model.source=BASE model.adapter=DIRECTORY"
GGUF = "GGUF is a format for inference, mostly quantized, and is not read"
CHUNK = 4 * 2**20
"""The number of bytes compared at a time."""


@dataclass(frozen=True, slots=True)
class Location:
    """The location of a tensor's values, stored row by row."""

    path: Path
    offset: int
    """Offset of the first byte in the file."""
    shape: tuple[int, ...]
    dtype: str
    """The dtype's name in safetensors, such as BF16."""
    name: str
    """The tensor's name in the file."""
    size: int
    """Bytes."""


def weights_entry(names: Collection[str]) -> str | None:
    """Return the single weights file or the index among the names of a directory or commit, as transformers does.

    Other safetensors files are not part of the model.
    """
    return next((name for name in (SINGLE, INDEX) if name in names), None)


def no_weights(names: Collection[str]) -> str:
    """Return the reason why there are no weights among ``names``, for a message that begins with the directory."""
    if ADAPTER_CONFIG in names:
        return f"is an adapter ({ADAPTER_CONFIG}) and not a model; {ADAPTER_FIX}"
    others = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf")))
    safetensors = sorted(name for name in names if name.endswith(".safetensors"))
    if safetensors:
        return (
            f"holds neither {SINGLE} nor {INDEX} (found {_some(safetensors)}), the two names that transformers reads; "
            f"rename a complete model in one file to {SINGLE}, or save it again with save_pretrained"
        )
    found = f" (found {_some(others)})" if others else ""
    fix = "weights are read from safetensors only"
    if others and all(name.endswith(".gguf") for name in others):
        fix = f"{GGUF}: use the safetensors of the model it was made from"
    return f"holds no *.safetensors{found}; {fix}"


def weight_files(directory: Path) -> list[Path]:
    """Return the single weights file, or the files that the index lists."""
    entry = weights_entry(names := _names(directory))
    if entry is None:
        raise UserError(f"{directory} {no_weights(names)}")
    if entry == SINGLE:
        return [directory / SINGLE]
    named = indexed_files(directory / INDEX)
    for name in named:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; {INDEX} names it, so the download is incomplete")
    return [directory / name for name in named]


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.is_dir()}


def read_index(index: Path) -> dict[str, str]:
    """Return the file names by tensor.

    Raises:
        UserError: The file is not an index, or names a file in another directory or of another kind.
    """
    try:
        named: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not a safetensors index: {error!r}") from error
    for name in sorted(named.values(), key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: file name {name!r} leaves the directory")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name} is not a safetensors file, and no other kind is read")
    return named


def indexed_files(index: Path) -> list[str]:
    """Return the names of the files that an index lists."""
    return sorted(set(read_index(index).values()))


def locate_tensors(directory: Path) -> dict[str, Location]:
    """Return the locations of all tensors, by their name in transformers' model with its output layer.

    Raises:
        UserError: There are no safetensors, a file is invalid, or the files disagree with each other or their index.
    """
    found: dict[str, Location] = {}
    files = weight_files(directory)
    for path in files:
        for name, location in read_header(path).items():
            if name in found:
                raise UserError(f"{path}: tensor {name} is in another file of {directory} too")
            found[name] = location
    if weights_entry(_names(directory)) == INDEX:
        _check_index(directory, found)
    if EMBEDDING.removeprefix(PREFIX) in found and not any(name.startswith(PREFIX) for name in found):
        return {name if name == HEAD else f"{PREFIX}{name}": location for name, location in found.items()}
    return found


def _check_index(directory: Path, found: dict[str, Location]) -> None:
    """Refuse an index that disagrees with its files; transformers would initialize missing tensors randomly."""
    for name, file in read_index(directory / INDEX).items():
        if name not in found:
            raise UserError(
                f"{directory / INDEX} says that {name} is in {file}, which lacks it; files and index are not from the "
                "same model: fetch or save them again"
            )
        if found[name].path.name != file:
            raise UserError(
                f"{directory / INDEX} says that {name} is in {file}, and it is in {found[name].path.name}; files and "
                "index are not from the same model: fetch or save them again"
            )


def read_header(path: Path) -> dict[str, Location]:
    """Read the tensors' locations from a file's header; safetensors validates it, but does not expose offsets."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"), path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    return {name: _location(path, 8 + length, name, field) for name, field in header.items() if name != "__metadata__"}


def _location(path: Path, start: int, name: str, field: dict[str, Any]) -> Location:
    first, last = field["data_offsets"]
    return Location(path, start + first, tuple(field["shape"]), field["dtype"], name, last - first)


def has_own_head(directory: Path) -> bool:
    """Return whether the weights hold an output layer that differs from the embedding, regardless of config.json.

    transformers 5 compares the two as well, and does not tie them if they differ. Weights that are missing or cannot be
    read are refused elsewhere.
    """
    try:
        tensors = locate_tensors(directory)
    except (UserError, OSError):
        return False
    if HEAD not in tensors or EMBEDDING not in tensors:
        return False
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return True
    stamps = tuple(location.path.stat().st_mtime_ns for location in (head, embedding))
    return not _same_bytes(head, embedding, stamps)


@cache
def _same_bytes(one: Location, other: Location, stamps: tuple[int, ...]) -> bool:
    """Compare two tensors' bytes, once per process while the files' modification times (``stamps``) stay."""
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.size, CHUNK):
            size = min(CHUNK, one.size - start)
            if first.read(size) != second.read(size):
                return False
    return True


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
