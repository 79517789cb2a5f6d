"""The tensors of a directory of safetensors by name. Torch is imported only to read a slice."""

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
    """The tensors of a Hugging Face directory by name, with a count of the bytes read.

    Raises:
        UserError: There are no safetensors, or the files and their index disagree.
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
        """Read the slice's bytes, mapped from the file; to read a complete model, loading/readers.py is faster."""
        tensor: torch.Tensor = self._slice(name)[slices if len(slices) > 1 else slices[0]]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _slice(self, name: str) -> Any:
        from safetensors import safe_open

        location = self._locations[name]
        handle: Any = safe_open(str(location.path), framework="pt")
        return handle.get_slice(location.name)


def check_tensors(directory: Path, architecture: Architecture) -> None:
    """Compare the headers with the tensors of the architecture, before anything heavy starts.

    Raises:
        UserError: A tensor is missing, of another shape, or unused.
    """
    checkpoint = Checkpoint(directory)
    found, expected = checkpoint.names, expected_shapes(architecture)
    _refuse_quantized(directory, found)
    missing = sorted(expected.keys() - found)
    if missing == [HEAD]:
        raise UserError(
            f"{directory}: its safetensors lack {HEAD}, which config.json requires: tie_word_embeddings is not true; "
            "transformers would make a random one. Save the model with its output layer (AutoModelForCausalLM), or set "
            "tie_word_embeddings to true if that is the embedding"
        )
    if missing:
        raise UserError(f"{directory}: its safetensors lack {_some(missing)}, which config.json requires")
    unknown = sorted(name for name in found - expected.keys() if not deliberately_unused(name, architecture))
    if unknown:
        raise UserError(f"{directory}: its safetensors hold {_some(unknown)}, which no layer of this model uses")
    # Later, a slice of a tensor that is too large would be read without an error.
    for name, shape in expected.items():
        if (actual := checkpoint.shape(name)) != shape:
            raise UserError(f"{directory}: tensor {name} has shape {actual} where config.json requires {shape}")
        if (dtype := checkpoint.location(name).dtype) not in DTYPES:
            raise UserError(
                f"{directory}: tensor {name} is {dtype}; weights must be {', '.join(DTYPES)}: use the model that "
                "this one was quantized from"
            )


QUANTIZED = (".qweight", ".qzeros", ".scales", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".absmax")
"""The name suffixes of the tensors that GPTQ, AWQ, fp8, compressed-tensors and bitsandbytes store for a weight."""


def _refuse_quantized(directory: Path, names: set[str]) -> None:
    if quantized := sorted(name for name in names if name.endswith(QUANTIZED)):
        raise UserError(
            f"{directory}: its safetensors hold {quantized[0]}, so they are quantized, which is not supported; use the "
            "model that this one was quantized from"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
