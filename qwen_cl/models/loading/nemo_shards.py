"""The loading of a NeMo 2.0 checkpoint of any parallel layout into Megatron's live shards, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from qwen_cl.models.architecture import Architecture
from qwen_cl.models.formats.nemo_weights import key_of_layer
from qwen_cl.models.formats.torch_dist import DistributedWeights
from qwen_cl.models.loading.megatron_shards import check_coverage, check_shape, layer_of, local_shards, vocabulary_rows
from qwen_cl.models.weight_mapping import Vocabulary, rule_for, tensor_shapes


@torch.no_grad()
def fill_from_nemo(
    sharded_state_dict: dict[str, Any],
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    weights: DistributedWeights,
    architecture: Architecture,
) -> int:
    """Copy each local slice from the checkpoint; return the number of shards filled.

    Sharded keys and global tensor layouts are Megatron's on both sides, so offsets agree; only the padding of a
    vocabulary may differ.

    Raises:
        CoverageError: A parameter was not filled exactly once.
        KeyError: The model has a tensor without a rule in the family's mapping.
        UserError: A tensor is missing, damaged or incomplete.
    """
    filled: list[tuple[int, int]] = []
    for shard in local_shards(sharded_state_dict):
        _fill_shard(shard, weights, architecture)
        start = shard.data.data_ptr()
        filled.append((start, start + shard.data.numel() * shard.data.element_size()))
    check_coverage(sorted(filled), parameters)
    return len(filled)


def _fill_shard(shard: ShardedTensor, weights: DistributedWeights, architecture: Architecture) -> None:
    rule, layer = rule_for(shard.key, architecture), layer_of(shard)
    check_shape(shard, rule, list(tensor_shapes(rule, layer, architecture).values()))
    key, offsets = shard.key, list(shard.global_offset)
    target = shard.data.view(shard.data.shape)
    if layer is not None and (layer_key := key_of_layer(key, layer)) in weights.keys:
        key, offsets = layer_key, offsets[shard.prepend_axis_num :]
    elif layer is not None:
        target = target.unsqueeze(0)
    if isinstance(rule, Vocabulary):
        rows = vocabulary_rows(shard, architecture)
        target[rows:].zero_()
        target = target[:rows]
    if target.numel():
        weights.read_into(target, key, offsets)
