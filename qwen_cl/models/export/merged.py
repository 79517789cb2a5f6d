"""The model that a run trained, tensor by tensor by Hugging Face name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_cl.config.errors import UserError
from qwen_cl.models.adapter_methods import ADAPTER, Adapter
from qwen_cl.models.architecture import Architecture
from qwen_cl.models.export.adapter import peft_tensors
from qwen_cl.models.formats.torch_dist import DistributedWeights
from qwen_cl.models.loading.base_adapter import PREFIX, BaseAdapter
from qwen_cl.models.loading.base_tensors import open_tensors
from qwen_cl.models.weight_mapping import (
    LAYER_PREFIX,
    OUTPUT_LAYER,
    TOP_LEVEL,
    WRAPPER_PREFIX,
    Vocabulary,
    expected_shapes,
    fused_shape,
    layer_rules,
    split_tensor,
    tensor_sources,
    top_level_rules,
)

VOCABULARIES = {key for key, rule in (TOP_LEVEL | OUTPUT_LAYER).items() if isinstance(rule, Vocabulary)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """The weights that a run trained, and the base they belong to."""

    weights: DistributedWeights
    source: str
    """The base as in the run's config: pinned, or a directory."""
    base: Path | None
    """The base's directory, or None if no weight of it is needed."""
    small_files: Path
    """Folder of config, tokenizer and chat template as their author wrote them."""
    architecture: Architecture
    adapter: Adapter | None
    base_adapter: BaseAdapter | None
    """The adapter merged into the base before the run; also None if no weight of the base is in the result."""
    tensor_parallel: int
    """Tensor parallel ranks of the run (see ``AdapterTensor.by_rank``)."""


class TrainedAdapter:
    """The adapter in a checkpoint, read one layer at a time.

    Raises:
        UserError: The checkpoint does not hold the adapter that the run's config describes.
    """

    def __init__(self, trained: TrainedModel) -> None:
        assert trained.adapter is not None
        self._trained = trained
        self._adapter = trained.adapter
        self._keys = _stored_keys(trained.weights)
        self.modules = list(trained.adapter.modules(trained.architecture))
        self._check()

    def layer(self, module: str, layer: int) -> dict[str, torch.Tensor]:
        """Return the adapter tensors of one Megatron linear layer (:attr:`modules`), by PEFT name."""
        trained, tensors = self._trained, dict[str, torch.Tensor]()
        for tensor in self._adapter.entry.tensors:
            full = trained.weights.read(self._keys[f"{module}{ADAPTER}{tensor.nemo}"], layer)
            tensors |= peft_tensors(tensor, module, layer, full, trained.architecture, trained.tensor_parallel)
        return tensors

    def merge(self, weight: torch.Tensor, name: str, layer: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight ``name`` (fp32) with the adapter tensors in ``layer`` merged in (see :meth:`layer`)."""
        entry, module = self._adapter.entry, f"{PREFIX}{name.removesuffix('.weight')}"
        adapter = {tensor.peft: layer[f"{module}.{tensor.peft}"] for tensor in entry.tensors}
        return entry.merge(weight, adapter, self._adapter.scale)

    def tensors(self) -> dict[str, torch.Tensor]:
        layers = range(self._trained.architecture.num_layers)
        return {
            name: tensor
            for module in self.modules
            for layer in layers
            for name, tensor in self.layer(module, layer).items()
        }

    def _check(self) -> None:
        architecture = self._trained.architecture
        shapes = self._adapter.tensor_shapes(architecture)
        expected = {key: (architecture.num_layers, *shape) for key, shape in shapes.items()}
        _check_stored(self._trained.weights, expected, self._keys)
        held = {key for key in self._keys if key.startswith(LAYER_PREFIX) and ADAPTER in key}
        if more := sorted(held - expected.keys()):
            raise UserError(f"{self._trained.weights.directory} holds {more[0]}, which is not in the run's config.yaml")


class MergedModel:
    """The tensors of the complete model by Hugging Face name, read and computed one at a time.

    ``dtype`` None keeps the base's dtype of each tensor.

    Raises:
        UserError: The checkpoint lacks a tensor of the model, or has it in another shape.
    """

    def __init__(self, trained: TrainedModel, dtype: torch.dtype | None) -> None:
        self.trained, self.dtype = trained, dtype
        base, architecture = trained.base, trained.architecture
        self._base = None if base is None else open_tensors(base, architecture, trained.base_adapter)
        self._sources = tensor_sources(trained.architecture)
        self._keys = _stored_keys(trained.weights)
        self._fused: tuple[tuple[str, int | None], tuple[torch.Tensor, ...]] | None = None
        self._layer: tuple[tuple[str, int], dict[str, torch.Tensor]] | None = None
        self._adapter = None if trained.adapter is None else TrainedAdapter(trained)
        if self._adapter is None:
            _check_stored(trained.weights, _full_shapes(trained.architecture), self._keys)
        shapes = expected_shapes(trained.architecture)
        self.tensors = {
            name: torch.empty(shape, dtype=self._dtype_of(name), device="meta") for name, shape in shapes.items()
        }
        """Meta tensors with the shapes and dtypes."""

    @property
    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        tensor = self._from_checkpoint(name) if self._adapter is None else self._from_base(name)
        return self._cast(name, tensor).contiguous()

    def _dtype_of(self, name: str) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        assert self._base is not None
        return self._base.dtype(name)

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        cast = tensor.to(self.tensors[name].dtype)
        if cast.dtype is torch.float16 and cast.isinf().any() and not tensor.isinf().any():
            raise UserError(
                f"task.dtype=fp16: {name} has values past {torch.finfo(torch.float16).max:g}, which fp16 cannot hold; "
                "write bf16 or fp32"
            )
        return cast

    def _from_base(self, name: str) -> torch.Tensor:
        assert self._base is not None
        assert self._adapter is not None
        weight = self._base.read(name, slice(None))
        key, layer, *_ = self._sources[name]
        module = key.removesuffix(".weight")
        if layer is None or module not in self._adapter.modules:
            return weight
        if self._layer is None or self._layer[0] != (module, layer):
            self._layer = (module, layer), self._adapter.layer(module, layer)
        return self._adapter.merge(weight.float(), name, self._layer[1])

    def _from_checkpoint(self, name: str) -> torch.Tensor:
        key, layer, rule, position = self._sources[name]
        if self._fused is None or self._fused[0] != (key, layer):
            full = self.trained.weights.read(self._keys[key], layer)
            self._fused = (key, layer), split_tensor(rule, full, self.trained.architecture)
        return self._fused[1][position]


def _stored_keys(weights: DistributedWeights) -> dict[str, str]:
    """Return the stored keys by sharded key without NeMo's wrapper prefix."""
    return {key.removeprefix(WRAPPER_PREFIX): key for key in weights.keys}


def _full_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a complete model by sharded key, with layers stacked along the first axis."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, rule in top_level_rules(architecture).items():
        shapes[key] = fused_shape(rule, None, architecture)
    for key, rule in layer_rules(architecture).items():
        shapes[LAYER_PREFIX + key] = (architecture.num_layers, *fused_shape(rule, 0, architecture))
    return shapes


def _check_stored(weights: DistributedWeights, expected: dict[str, tuple[int, ...]], stored: dict[str, str]) -> None:
    for key, shape in expected.items():
        if key not in stored:
            raise UserError(f"{weights.directory} lacks {key}; it is not a checkpoint of this run's model")
        found = weights.shape(stored[key])
        padded = key in VOCABULARIES and len(found) == len(shape) and found[0] > shape[0]
        if found != (found[0], *shape[1:]) if padded else found != shape:
            raise UserError(f"{weights.directory}: {key} has shape {found} where the run's config requires {shape}")
