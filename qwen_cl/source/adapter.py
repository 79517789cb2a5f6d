"""A trained LoRA or DoRA in PEFT's own format, whatever layout it was trained in."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import save_file

from qwen_cl.source.architecture import Architecture, read_architecture
from qwen_cl.source.families import GateUp, QueryKeyValue, rule_for, tensor_shapes
from qwen_cl.source.reference import HUB_REFERENCE, local_directory, read_model_config
from qwen_cl.source.shards import layer_of, local_shards, split_qkv

ADAPTER = ".adapter."


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]
    """Megatron's names."""
    dora: bool


def save_adapter(model: Any, shape: AdapterShape, source: str, directory: Path) -> None:
    """Gather the adapter on rank 0 and write it there; every rank calls. The folder appears whole or not at all."""
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
    tensors: dict[str, torch.Tensor] = {}
    for (key, layer), full in _assemble(part for rank in gathered for part in rank).items():
        tensors.update(_to_peft(key, layer, full, architecture))
    _write(tensors, shape, source, directory)


def _assemble(shards: Any) -> dict[tuple[str, int], torch.Tensor]:
    full: dict[tuple[str, int], torch.Tensor] = {}
    for key, layer, prepended, global_shape, global_offset, data in shards:
        whole = full.setdefault((key, layer), torch.zeros(global_shape[prepended:], dtype=data.dtype))
        offset = global_offset[prepended:]
        whole[tuple(slice(start, start + size) for start, size in zip(offset, data.shape))] = data
    return full


def _to_peft(key: str, layer: int, full: torch.Tensor, architecture: Architecture) -> dict[str, torch.Tensor]:
    """One of Megatron's fused tensors as PEFT's: the modules of a fused layer share A and split B by rows."""
    module, _, part = key.partition(ADAPTER)
    rule = rule_for(f"{module}.weight", architecture)
    names = [name.removesuffix(".weight") for name in tensor_shapes(rule, layer, architecture)]
    if part == "linear_in.weight":
        pieces: tuple[torch.Tensor, ...] = (full,) * len(names)
        suffix = "lora_A.weight"
    else:
        suffix = "lora_B.weight" if part == "linear_out.weight" else "lora_magnitude_vector"
        if isinstance(rule, QueryKeyValue):
            pieces = split_qkv(full, architecture)
        elif isinstance(rule, GateUp):
            pieces = _split_gate_up(full, interleaved=suffix == "lora_magnitude_vector")
        else:
            pieces = (full,)
    return {f"base_model.model.{name}.{suffix}": piece.contiguous().clone() for name, piece in zip(names, pieces)}


def _split_gate_up(full: torch.Tensor, *, interleaved: bool) -> tuple[torch.Tensor, ...]:
    """DoRA's magnitudes are sharded as they lie on each rank: that rank's gate rows, then its up rows."""
    if not interleaved:
        return full.chunk(2)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    by_rank = full.view(ranks, 2, -1)
    return by_rank[:, 0].flatten(), by_rank[:, 1].flatten()


def _write(tensors: dict[str, torch.Tensor], shape: AdapterShape, source: str, directory: Path) -> None:
    from peft import LoraConfig

    match = HUB_REFERENCE.fullmatch(source)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=sorted({name.split(".")[-3 if name.endswith(".weight") else -2] for name in tensors}),
        use_dora=shape.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=match["repo"] if match else source,
        revision=match["revision"] if match else None,
        inference_mode=True,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".adapter-") as name:
        config.save_pretrained(name)
        save_file(tensors, str(Path(name) / "adapter_model.safetensors"), metadata={"format": "pt"})
        Path(name).chmod(0o755)
        Path(name).rename(directory)
        Path(name).mkdir()  # what the context manager goes on to remove
