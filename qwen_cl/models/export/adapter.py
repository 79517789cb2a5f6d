"""A trained LoRA or DoRA in PEFT's format, from any parallel layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import save_file

from qwen_cl.files.atomic_folder import atomic_directory
from qwen_cl.models.adapter_methods import ADAPTER, Adapter, AdapterTensor
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.generation_config import write_generation_config
from qwen_cl.models.loading.adapted import read_factors
from qwen_cl.models.loading.base_adapter import PREFIX, BaseAdapter, find_adapter
from qwen_cl.models.loading.megatron_shards import layer_of, local_shards
from qwen_cl.models.reference import HUB_REFERENCE, local_directory, read_model_config
from qwen_cl.models.weight_mapping import rule_for, split_tensor, tensor_shapes


def save_adapter(
    model: Any,
    adapter: Adapter,
    source: str,
    directory: Path,
    small_files: Path,
    stops: Sequence[int],
    base_adapter: str | None = None,
) -> None:
    """Gather the adapter on rank 0 and write it, combined with the one merged into the base; called by every rank.

    The folder appears complete or not at all. ``small_files`` and ``stops`` are those of write_adapter.
    """
    shards = [
        (shard.key, layer_of(shard), shard.prepend_axis_num, shard.global_shape, shard.global_offset, shard.data.cpu())
        for shard in local_shards(model.sharded_state_dict())
        if ADAPTER in shard.key
    ]
    gathered: list[Any] | None = None
    if torch.distributed.get_rank() == 0:
        gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(shards, gathered)
    if gathered is None:
        return
    base = local_directory(source)
    architecture = read_architecture(read_model_config(base), base)
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    parts = {tensor.nemo: tensor for tensor in adapter.entry.tensors}
    tensors: dict[str, torch.Tensor] = {}
    for (key, layer), full in _assemble(part for rank in gathered for part in rank).items():
        module, _, part = key.partition(ADAPTER)
        tensors |= peft_tensors(parts[part], module, layer, full, architecture, tensor_parallel)
    merged = find_adapter(base_adapter, base, architecture)
    write_adapter(*combine_adapters(tensors, adapter, merged), source, directory, small_files, stops)


def _assemble(shards: Any) -> dict[tuple[str, int], torch.Tensor]:
    full: dict[tuple[str, int], torch.Tensor] = {}
    for key, layer, prepended, global_shape, global_offset, data in shards:
        tensor = full.setdefault((key, layer), torch.zeros(global_shape[prepended:], dtype=data.dtype))
        offset = global_offset[prepended:]
        tensor[tuple(slice(start, start + size) for start, size in zip(offset, data.shape))] = data
    return full


def peft_tensors(
    tensor: AdapterTensor,
    module: str,
    layer: int,
    full: torch.Tensor,
    architecture: Architecture,
    tensor_parallel: int,
) -> dict[str, torch.Tensor]:
    """Return one adapter tensor of a fused layer as PEFT's tensors for its modules.

    A tensor with the layer's rows is split by rows; any other is shared. ``tensor_parallel`` is the run's (see
    ``AdapterTensor.by_rank``).
    """
    rule = rule_for(f"{module}.weight", architecture)
    names = [name.removesuffix(".weight") for name in tensor_shapes(rule, layer, architecture)]
    pieces: tuple[torch.Tensor, ...] = (full,) * len(names)
    if "rows" in tensor.shape:
        pieces = split_tensor(rule, full, architecture, by_rank=tensor_parallel if tensor.by_rank else 1)
    return {f"{PREFIX}{name}.{tensor.peft}": piece.contiguous().clone() for name, piece in zip(names, pieces)}


def combine_adapters(
    tensors: dict[str, torch.Tensor], adapter: Adapter, first: BaseAdapter | None
) -> tuple[dict[str, torch.Tensor], Adapter]:
    """Return one adapter of the unmodified base, equivalent to ``first``, merged into it, and ``tensors`` together.

    Their ranks are concatenated, the scales are folded into B, and a module that only one of them changes is padded
    with zeros to the same rank.
    """
    if first is None:
        return tensors, adapter
    assert adapter.entry.not_on_adapter is None  # refused before the run
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, factors in first.factors.items():
        down, up = read_factors(factors)
        parts[f"{PREFIX}{name.removesuffix('.weight')}"] = [(down, up * factors.scale)]
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            pair = tensors[name].float(), tensors[f"{module}.lora_B.weight"].float() * adapter.scale
            parts.setdefault(module, []).append(pair)
    rank = max(sum(len(down) for down, _ in pairs) for pairs in parts.values())
    result = {}
    for module, pairs in parts.items():
        down, up = torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1)
        more = rank - len(down)
        result[f"{module}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, more))
        result[f"{module}.lora_B.weight"] = torch.nn.functional.pad(up, (0, more)).contiguous()
    return result, replace(adapter, method="lora", rank=rank, alpha=float(rank))


def write_adapter(
    tensors: dict[str, torch.Tensor],
    adapter: Adapter,
    source: str,
    directory: Path,
    small_files: Path,
    stops: Sequence[int],
    card: str | None = None,
) -> None:
    """Write an adapter with the base's ``small_files`` and the stop tokens that the run trained (``stops``).

    PEFT reads no generation settings from an adapter; the file beside it is for ``GenerationConfig.from_pretrained``.
    """
    from peft import LoraConfig

    match = HUB_REFERENCE.fullmatch(source)
    config = LoraConfig(
        **adapter.peft_arguments(),
        target_modules=sorted({name.split(".")[-3 if name.endswith(".weight") else -2] for name in tensors}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=match["repo"] if match else source,
        revision=match["revision"] if match else None,
        inference_mode=True,
    )
    with atomic_directory(directory) as temporary:
        config.save_pretrained(temporary)
        _sort_modules(temporary / "adapter_config.json")
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_generation_config(temporary, small_files, stops)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def _sort_modules(path: Path) -> None:
    """Sort the modules, which PEFT keeps in a set, so that the same adapter gives the same file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
