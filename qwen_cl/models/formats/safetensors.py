"""A directory of safetensors as one mapping of names to slices. Torch only when a slice is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.architecture import Architecture
from qwen_cl.models.formats.tensor_files import DTYPES, HEAD, Location, locate_tensors
from qwen_cl.models.weight_mapping import deliberately_unused, expected_shapes

if TYPE_CHECKING:
    import torch


class Checkpoint:
    """The tensors of a Hugging Face directory, by name; counts the bytes of them that are read.

    Raises:
        UserError: no safetensors, or the files and their index disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.bytes_read = 0
        self._locations = locate_tensors(directory)

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

        location = self._locations[name]
        handle: Any = safe_open(str(location.path), framework="pt")
        return handle.get_slice(location.name)


def check_tensors(directory: Path, architecture: Architecture) -> None:
    """Compare the headers with what the architecture needs, before anything heavy starts.

    Raises:
        UserError: a tensor is missing, of another shape, or there though nothing would use it.
    """
    checkpoint = Checkpoint(directory)
    found, expected = checkpoint.names, expected_shapes(architecture)
    _refuse_quantized(directory, found)
    missing = sorted(expected.keys() - found)
    if missing == [HEAD]:
        raise UserError(
            f"{directory}: its safetensors lack {HEAD}, which config.json calls for: tie_word_embeddings is not true; "
            "transformers would make a random one. Save the model with its output layer (AutoModelForCausalLM), or set "
            "tie_word_embeddings to true if that is the embedding"
        )
    if missing:
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


QUANTIZED = (".qweight", ".qzeros", ".scales", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".absmax")
"""Ends of the names that GPTQ, AWQ, fp8, compressed-tensors and bitsandbytes give what belongs to a weight."""


def _refuse_quantized(directory: Path, names: set[str]) -> None:
    if quantized := sorted(name for name in names if name.endswith(QUANTIZED)):
        raise UserError(
            f"{directory}: its safetensors hold {quantized[0]}, so they are quantized, which is not supported; use the "
            "model that this one was quantized from"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
