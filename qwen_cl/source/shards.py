"""Fill Megatron's live shards from safetensors, in place: nothing is converted on disk.

``sharded_state_dict()`` says, for each local tensor, its canonical key, its global shape and the slice of it that
this rank holds, whatever the layer implementation, the tensor and the pipeline layout. Its ``data`` are views of
the parameters themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from qwen_cl.source.architecture import Architecture
from qwen_cl.source.checkpoint import Checkpoint
from qwen_cl.source.families import GateUp, QueryKeyValue, Rule, Vocabulary, rule_for, tensor_shapes


class CoverageError(RuntimeError):
    """A parameter was left unfilled, filled twice or from another shape; the run must not train on it."""


@torch.no_grad()
def fill(
    sharded_state_dict: dict[str, Any],
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    checkpoint: Checkpoint,
    architecture: Architecture,
) -> int:
    """Copy each local slice from the checkpoint; returns the number of shards filled.

    Raises:
        CoverageError: a parameter was not filled exactly once, or has another shape than its source.
        KeyError: the model has a tensor the family's table does not know.
    """
    filled: list[tuple[int, int]] = []
    for shard in local_shards(sharded_state_dict):
        _fill_shard(shard, checkpoint, architecture)
        start = shard.data.data_ptr()
        filled.append((start, start + shard.data.numel() * shard.data.element_size()))
    _check_coverage(sorted(filled), parameters)
    return len(filled)


def local_shards(sharded_state_dict: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Each tensor this rank holds, with factories (fc1's gate and up) opened."""
    for value in sharded_state_dict.values():
        if isinstance(value, ShardedTensorFactory):
            yield from local_shards({str(number): part for number, part in enumerate(value.build())})
        elif isinstance(value, ShardedTensor) and value.data is not None:
            yield value


def layer_of(shard: ShardedTensor) -> int | None:
    """The global layer number, which Megatron prepends as an axis."""
    return shard.global_offset[0] if shard.prepend_axis_num else None


def _fill_shard(shard: ShardedTensor, checkpoint: Checkpoint, architecture: Architecture) -> None:
    rule = rule_for(shard.key, architecture)
    shapes = tensor_shapes(rule, layer_of(shard), architecture)
    names = tuple(shapes)
    _check_shape(shard, rule, list(shapes.values()))
    offset = shard.global_offset[shard.prepend_axis_num :]
    if isinstance(rule, QueryKeyValue):
        shard.data.copy_(_read_qkv(names, offset[0], shard.local_shape[0], checkpoint, architecture))
    elif isinstance(rule, GateUp):
        which, first_row = divmod(offset[0], architecture.ffn_hidden_size)
        shard.data.copy_(checkpoint.read(names[which], slice(first_row, first_row + shard.local_shape[0])))
    elif isinstance(rule, Vocabulary):
        rows = max(0, min(offset[0] + shard.local_shape[0], architecture.vocab_size) - offset[0])
        shard.data[rows:].zero_()
        shard.data[:rows].copy_(checkpoint.read(names[0], slice(offset[0], offset[0] + rows)))
    else:
        slices = [slice(start, start + size) for start, size in zip(offset, shard.local_shape)]
        shard.data.copy_(checkpoint.read(names[0], *slices))


def _check_shape(shard: ShardedTensor, rule: Rule, shapes: list[tuple[int, ...]]) -> None:
    """The model was built for these tensors: only a vocabulary may have more rows, which are padding."""
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1:]
    built = shard.global_shape[shard.prepend_axis_num :]
    more_rows = isinstance(rule, Vocabulary) and built[0] > rows
    if built[1:] != columns or not (built[0] == rows or more_rows):
        raise CoverageError(f"{shard.key} is built with shape {built}, its source has {(rows, *columns)}")


def _read_qkv(
    names: tuple[str, ...], first_row: int, num_rows: int, checkpoint: Checkpoint, architecture: Architecture
) -> torch.Tensor:
    """Rows of the fused tensor, which go by KV group: its query heads, its key head, its value head."""
    width = architecture.kv_channels
    queries = architecture.num_attention_heads // architecture.num_query_groups
    rows_per_group = (queries + 2) * width
    first, last = first_row // rows_per_group, (first_row + num_rows) // rows_per_group

    def groups(name: str, heads: int) -> torch.Tensor:
        rows = checkpoint.read(name, slice(first * heads * width, last * heads * width))
        return rows.view(last - first, heads * width, *rows.shape[1:])

    parts = [groups(names[0], queries), groups(names[1], 1), groups(names[2], 1)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(fused: torch.Tensor, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of the interleaving, for a whole fused tensor of shape (rows, …)."""
    width = architecture.kv_channels
    queries = architecture.num_attention_heads // architecture.num_query_groups
    grouped = fused.view(architecture.num_query_groups, queries + 2, width, *fused.shape[1:])
    query, key, value = grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]
    return query.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)


def pieces_of(
    rule: Rule, full: torch.Tensor, architecture: Architecture, *, by_rank: int = 1
) -> tuple[torch.Tensor, ...]:
    """A whole Megatron tensor as the rule's Hugging Face tensors: what :func:`fill` does, backwards.

    ``by_rank`` > 1 is for rows that lie as they did on that many tensor parallel ranks, gate and up on each.
    """
    if isinstance(rule, QueryKeyValue):
        return split_qkv(full, architecture)
    if isinstance(rule, GateUp):
        ranks = full.view(by_rank, 2, -1, *full.shape[1:])
        return ranks[:, 0].flatten(0, 1), ranks[:, 1].flatten(0, 1)
    return (full[: architecture.vocab_size] if isinstance(rule, Vocabulary) else full,)


def _check_coverage(filled: list[tuple[int, int]], parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Shards are contiguous row ranges, so a parameter is covered when they tile its bytes without a gap."""
    for previous, current in itertools.pairwise(filled):
        if current[0] < previous[1]:
            raise CoverageError("two shards were written to the same parameter; the weights cannot be trusted")
    for name, parameter in parameters:
        start = parameter.data_ptr()
        end = start + parameter.numel() * parameter.element_size()
        covered = sum(stop - begin for begin, stop in filled if start <= begin and stop <= end)
        if covered != end - start:
            raise CoverageError(
                f"parameter {name}: {covered} of {end - start} bytes came from the checkpoint; "
                "the weights cannot be trusted"
            )
