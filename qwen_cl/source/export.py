"""A run's checkpoint as Hugging Face would have it: a PEFT adapter, or the whole model with the adapter merged in."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from qwen_cl.config.errors import UserError
from qwen_cl.source.adapter import ADAPTER, AdapterShape, peft_tensors, write_adapter
from qwen_cl.source.architecture import Architecture
from qwen_cl.source.checkpoint import INDEX, Checkpoint
from qwen_cl.source.distributed import DistributedWeights
from qwen_cl.source.families import (
    LAYER_PREFIX,
    WRAPPER_PREFIX,
    Rule,
    expected_shapes,
    layer_rules,
    tensor_shapes,
    top_level_rules,
)
from qwen_cl.source.shards import pieces_of
from qwen_cl.source.small_files import copy_small_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run left, and what it needs from its base."""

    weights: DistributedWeights
    base: Path
    """Directory in Hugging Face layout."""
    source: str
    """The base as the run named it: pinned, or a directory."""
    architecture: Architecture
    adapter: AdapterShape | None
    tensor_parallel: int
    """Of the run: see ``peft_tensors``."""

    @property
    def has_adapter(self) -> bool:
        return any(ADAPTER in key for key in self.weights.keys)


def export_adapter(trained: Trained, directory: Path) -> None:
    """PEFT's format. Raises UserError where the checkpoint holds no adapter."""
    if trained.adapter is None or not trained.has_adapter:
        raise UserError(f"{trained.weights.directory} holds no adapter; write task.format=merged")
    write_adapter(_adapter_tensors(trained), trained.adapter, trained.source, directory)


def export_merged(trained: Trained, directory: Path, dtype: torch.dtype | None, max_shard_size: str, card: str) -> None:
    """The whole model in Hugging Face layout; ``dtype`` None keeps the base's, tensor by tensor.

    Raises:
        UserError: the disk is too small, or a tensor of the model is not in the checkpoint.
    """
    model = _Merged(trained, dtype)
    shapes = expected_shapes(trained.architecture)
    empty = {name: torch.empty(shape, dtype=model.dtype_of(name), device="meta") for name, shape in shapes.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in empty.values())
    directory.parent.mkdir(parents=True, exist_ok=True)
    _require_space(directory, size)
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    with appearing(directory) as temporary:
        for file, names in plan.filename_to_tensors.items():
            save_file({name: model.read(name) for name in names}, temporary / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": {"total_size": size}, "weight_map": plan.tensor_to_filename}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _copy_small_files(trained.base, temporary, dtype)
        (temporary / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A folder beside ``directory`` that becomes it when the block ends well, and vanishes when it does not."""
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _require_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory.parent).free
    if size > free:
        raise UserError(
            f"task.output ({directory}) needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; "
            "make room, or choose another folder"
        )


def _adapter_tensors(trained: Trained) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for key in sorted(key for key in trained.weights.keys if ADAPTER in key):
        for layer in range(trained.architecture.num_layers):
            full = trained.weights.read(key, layer)
            tensors |= peft_tensors(key, layer, full, trained.architecture, trained.tensor_parallel)
    return tensors


class _Merged:
    """The tensors of the merged model by Hugging Face name, one at a time."""

    def __init__(self, trained: Trained, dtype: torch.dtype | None) -> None:
        self._trained, self._dtype = trained, dtype
        self._base = Checkpoint(trained.base)
        self._adapter = _adapter_tensors(trained) if trained.has_adapter else None
        self._sources = _sources(trained.architecture)
        self._fused: tuple[tuple[str, int | None], tuple[torch.Tensor, ...]] | None = None
        if self._adapter is None:
            absent = sorted({key for key, *_ in self._sources.values()} - self._keys().keys())
            if absent:
                raise UserError(f"{trained.weights.directory} lacks {absent[0]}; it is no checkpoint of this model")

    def dtype_of(self, name: str) -> torch.dtype:
        return self._dtype or self._base.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        if self._adapter is None:
            return self._from_checkpoint(name).to(self.dtype_of(name)).contiguous()
        weight = self._base.read(name, slice(None))
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if name.endswith(".weight") and f"{module}.lora_A.weight" in self._adapter:
            weight = self._merge(weight.float(), module)
        return weight.to(self.dtype_of(name)).contiguous()

    def _merge(self, weight: torch.Tensor, module: str) -> torch.Tensor:
        """In fp32: LoRA (arXiv 2106.09685), and DoRA's rows rescaled to their magnitude (arXiv 2402.09353)."""
        assert self._adapter is not None and self._trained.adapter is not None
        scale = self._trained.adapter.alpha / self._trained.adapter.rank
        up, down = (self._adapter[f"{module}.lora_{factor}.weight"].float() for factor in "BA")
        merged = weight + scale * (up @ down)
        magnitude = self._adapter.get(f"{module}.lora_magnitude_vector")
        if magnitude is None:
            return merged
        return merged * (magnitude.float() / merged.norm(dim=1)).unsqueeze(1)

    def _from_checkpoint(self, name: str) -> torch.Tensor:
        key, layer, rule, position = self._sources[name]
        if self._fused is None or self._fused[0] != (key, layer):
            full = self._trained.weights.read(self._keys()[key], layer)
            self._fused = (key, layer), pieces_of(rule, full, self._trained.architecture)
        return self._fused[1][position]

    def _keys(self) -> dict[str, str]:
        return {key.removeprefix(WRAPPER_PREFIX): key for key in self._trained.weights.keys}


def _sources(architecture: Architecture) -> dict[str, tuple[str, int | None, Rule, int]]:
    """Hugging Face name -> sharded key, layer, rule, and which of the rule's tensors it is."""
    rules: list[tuple[str, int | None, Rule]] = [
        (key, None, rule) for key, rule in top_level_rules(architecture).items()
    ]
    for layer in range(architecture.num_layers):
        rules += [(LAYER_PREFIX + key, layer, rule) for key, rule in layer_rules(architecture).items()]
    return {
        name: (key, layer, rule, position)
        for key, layer, rule in rules
        for position, name in enumerate(tensor_shapes(rule, layer, architecture))
    }


def _copy_small_files(base: Path, directory: Path, dtype: torch.dtype | None) -> None:
    copy_small_files(base, directory)
    if dtype is not None:
        path = directory / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
