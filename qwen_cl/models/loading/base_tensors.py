"""A base model's tensors by Hugging Face name, from either layout."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen_cl.models.architecture import Architecture
from qwen_cl.models.formats.nemo_layout import WEIGHTS, is_nemo_checkpoint
from qwen_cl.models.formats.nemo_weights import check_nemo_tensors, key_of_layer
from qwen_cl.models.formats.safetensors import Checkpoint
from qwen_cl.models.formats.torch_dist import DistributedWeights
from qwen_cl.models.loading.adapted import AdaptedTensors, Tensors
from qwen_cl.models.loading.base_adapter import BaseAdapter
from qwen_cl.models.weight_mapping import WRAPPER_PREFIX, split_tensor, tensor_sources


def open_tensors(directory: Path, architecture: Architecture, adapter: BaseAdapter | None = None) -> Tensors:
    """Open the tensors of a base model, with ``adapter`` merged in."""
    base = NemoTensors(directory, architecture) if is_nemo_checkpoint(directory) else Checkpoint(directory)
    return base if adapter is None else AdaptedTensors(base, adapter)


class NemoTensors:
    """The tensors of a NeMo 2.0 checkpoint by Hugging Face name; each is read completely, then sliced.

    Raises:
        UserError: The checkpoint is damaged or of another architecture.
    """

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        check_nemo_tensors(directory, architecture)
        self._weights = DistributedWeights(directory / WEIGHTS)
        self._architecture = architecture
        self._sources = tensor_sources(architecture)
        self._fused: tuple[tuple[str, int | None], tuple[torch.Tensor, ...]] | None = None

    def dtype(self, name: str) -> torch.dtype:
        key, layer, *_ = self._sources[name]
        return self._weights.dtype(self._stored(key, layer)[0])

    def read(self, name: str, *slices: slice) -> torch.Tensor:
        key, layer, rule, position = self._sources[name]
        if self._fused is None or self._fused[0] != (key, layer):
            full = self._weights.read(*self._stored(key, layer))
            self._fused = (key, layer), split_tensor(rule, full, self._architecture)
        return self._fused[1][position][slices]

    def _stored(self, key: str, layer: int | None) -> tuple[str, int | None]:
        key = WRAPPER_PREFIX + key
        if layer is not None and (layer_key := key_of_layer(key, layer)) in self._weights.keys:
            return layer_key, None
        return key, layer
