"""The loading of safetensors into Megatron's live shards, in place; nothing is converted on disk.

``sharded_state_dict()`` gives, for each local tensor, its canonical key, its global shape and the slice of it on this
rank, for any layer implementation and any tensor and pipeline layout. Its ``data`` are views of the parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from qwen_cl.models.architecture import Architecture
from qwen_cl.models.formats.safetensors import Checkpoint
from qwen_cl.models.loading.adapted import copy_adapted
from qwen_cl.models.loading.base_adapter import BaseAdapter
from qwen_cl.models.loading.readers import Copy, LoadProgress, read_into
from qwen_cl.models.weight_mapping import GateUp, QueryKeyValue, Rule, Vocabulary, rule_for, tensor_shapes


class CoverageError(RuntimeError):
    """The error of a parameter that was not filled, filled twice or from another shape; training must not start."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The copies that fill every byte of this rank's parameters exactly once."""

    copies: list[Copy]
    padding: list[torch.Tensor]
    """Padding rows of the vocabulary, which become zero."""
    shards: int


@torch.no_grad()
def fill(
    sharded_state_dict: dict[str, Any],
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    checkpoint: Checkpoint,
    architecture: Architecture,
    *,
    adapter: BaseAdapter | None = None,
    readers: int | None = None,
    progress: LoadProgress | None = None,
) -> int:
    """Copy each local slice from the checkpoint, with ``adapter`` merged in; return the number of shards filled.

    Raises:
        CoverageError: A parameter would not be filled exactly once, or has another shape than its source.
        KeyError: The model has a tensor without a rule in the family's mapping.
        UserError: A file cannot be read.
    """
    plan = plan_copies(sharded_state_dict, architecture)
    written = [*(copy.destination for copy in plan.copies), *plan.padding]
    check_coverage(sorted(span_of(tensor) for tensor in written), parameters)
    for rows in plan.padding:
        rows.zero_()
    changed = {} if adapter is None else adapter.factors
    plain = [copy for copy in plan.copies if copy.tensor not in changed]
    read_into(plain, checkpoint, readers=readers, progress=progress)
    if adapter is not None:
        copy_adapted((copy for copy in plan.copies if copy.tensor in changed), checkpoint, adapter)
    return plan.shards


def plan_copies(sharded_state_dict: dict[str, Any], architecture: Architecture) -> LoadPlan:
    """Plan the copies into views of the parameters; nothing is read or written yet."""
    plan = LoadPlan([], [], 0)
    shards = list(local_shards(sharded_state_dict))
    for shard in shards:
        if not shard.data.is_contiguous():
            raise CoverageError(f"{shard.key} is not contiguous, so its bytes cannot be accounted for")
        rule = rule_for(shard.key, architecture)
        shapes = tensor_shapes(rule, layer_of(shard), architecture)
        check_shape(shard, rule, list(shapes.values()))
        plan.copies.extend(_copies(shard, rule, tuple(shapes), architecture))
        if isinstance(rule, Vocabulary) and (rows := vocabulary_rows(shard, architecture)) < shard.local_shape[0]:
            plan.padding.append(shard.data[rows:])
    return replace(plan, shards=len(shards))


def local_shards(sharded_state_dict: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Yield each tensor on this rank, with factories (fc1's gate and up) expanded."""
    for value in sharded_state_dict.values():
        if isinstance(value, ShardedTensorFactory):
            yield from local_shards({str(number): part for number, part in enumerate(value.build())})
        elif isinstance(value, ShardedTensor) and value.data is not None:
            yield value


def layer_of(shard: ShardedTensor) -> int | None:
    """Return the global layer number, which Megatron prepends as an axis."""
    return shard.global_offset[0] if shard.prepend_axis_num else None


def _copies(shard: ShardedTensor, rule: Rule, names: tuple[str, ...], architecture: Architecture) -> Iterable[Copy]:
    first_row, *columns = shard.global_offset[shard.prepend_axis_num :]
    if isinstance(rule, QueryKeyValue):
        return qkv_copies(shard.data, names, first_row, architecture)
    if isinstance(rule, GateUp):
        which, first_row = divmod(first_row, architecture.ffn_hidden_size)
        return [Copy(shard.data, names[which], first_row)]
    if isinstance(rule, Vocabulary):
        return [Copy(shard.data[: vocabulary_rows(shard, architecture)], names[0], first_row)]
    return [Copy(shard.data, names[0], first_row, *columns)]


def vocabulary_rows(shard: ShardedTensor, architecture: Architecture) -> int:
    """Return the number of the shard's rows that are in the checkpoint; the rest is padding."""
    first = shard.global_offset[shard.prepend_axis_num]
    return max(0, min(first + shard.local_shape[0], architecture.vocab_size) - first)


def check_shape(shard: ShardedTensor, rule: Rule, shapes: list[tuple[int, ...]]) -> None:
    """Check that the shard has the shape of its source; only a vocabulary may have more rows, its padding."""
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1:]
    built = shard.global_shape[shard.prepend_axis_num :]
    more_rows = isinstance(rule, Vocabulary) and built[0] > rows
    if built[1:] != columns or not (built[0] == rows or more_rows):
        raise CoverageError(f"{shard.key} is built with shape {built}, its source has {(rows, *columns)}")


def qkv_copies(
    fused: torch.Tensor, names: tuple[str, ...], first_row: int, architecture: Architecture
) -> Iterator[Copy]:
    """Yield the copies of a fused tensor, by KV group: its query heads, its key head, its value head."""
    width = architecture.kv_channels
    queries = architecture.num_attention_heads // architecture.num_query_groups
    groups = fused.view(-1, (queries + 2) * width, *fused.shape[1:])
    for number, group in enumerate(groups, first_row // groups.shape[1]):
        parts = group[: queries * width], group[queries * width : -width], group[-width:]
        for name, rows in zip(names, parts):
            yield Copy(rows, name, number * len(rows))


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of a contiguous tensor's first byte and of the byte after its last."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def check_coverage(filled: list[tuple[int, int]], parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Check that the ranges written, which are contiguous rows, cover each parameter's bytes without gap or overlap."""
    for previous, current in itertools.pairwise(filled):
        if current[0] < previous[1]:
            raise CoverageError("two shards were written to the same parameter; the weights cannot be trusted")
    for name, parameter in parameters:
        start, end = span_of(parameter)
        covered = sum(stop - begin for begin, stop in filled if start <= begin and stop <= end)
        if covered != end - start:
            raise CoverageError(
                f"parameter {name}: {covered} of {end - start} bytes came from the checkpoint; "
                "the weights cannot be trusted"
            )
