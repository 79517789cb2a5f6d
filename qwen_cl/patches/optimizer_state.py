"""Save the distributed optimizer's state so that any layout can resume from it, without gathering it.

The names and shapes in the checkpoint are those of ``DistributedOptimizer.sharded_param_state_fully_reshardable``
(megatron-core 0.15): the fp32 copy and Adam's two moments of each parameter, complete. Megatron copies the state to the
host, gathers all of it on every rank of the data parallel group, and copies it twice more, while training waits: for
0.5B parameters in one process on two cores, 18 s and 13 GB. But nearly every parameter is complete on one rank already.
Here that rank saves it; of the few parameters that are split between ranks, the rank with the largest part collects the
others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from qwen_cl.patches import registry

STATE = ("param", "exp_avg", "exp_avg_sq")


def install() -> None:
    registry.replace(DistributedOptimizer, "sharded_param_state_fully_reshardable", _sharded_state)


@dataclass(frozen=True, slots=True)
class StatePiece:
    """The part of a flattened parameter that one rank of the data parallel group has."""

    rank: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def pieces_of(start: int, end: int, bucket_start: int, share: int) -> list[StatePiece]:
    """Return the pieces of a parameter at ``start`` to ``end`` of a buffer whose bucket is split in parts of
    ``share``."""
    first, last = (start - bucket_start) // share, (end - 1 - bucket_start) // share
    edges = [start, *(bucket_start + rank * share for rank in range(first + 1, last + 1)), end]
    return [StatePiece(first + n, edges[n] - start, edges[n + 1] - start) for n in range(last - first + 1)]


def _sharded_state(
    self: Any, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, Any]]:
    """Replace Megatron's method. The keys number the parameters; each rank returns those that it saves or loads."""
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_parameter = {each.data: each for each in nested_values(sharded)}
    state = {}
    for number, (parameter, pieces) in enumerate(_parameters(self)):
        complete = _allocate(self, parameter, pieces) if is_loading else _collect(self, parameter, pieces)
        if complete is not None:
            is_main = not is_loading or pieces[0].rank == self.data_parallel_group.rank()
            state[number] = {
                key: _sharded_tensor(of_parameter[parameter], key, tensor.view(parameter.shape), self, is_main)
                for key, tensor in complete.items()
            }
    return state


def _parameters(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, list[StatePiece]]]:
    """Yield the parameters with their pieces, in the order of Megatron's loading."""
    ranks = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket_number) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_number]
            yield parameter, pieces_of(start, end, bucket.offset, bucket.grad_data.numel() // ranks)


def _allocate(
    optimizer: Any, parameter: torch.nn.Parameter, pieces: list[StatePiece]
) -> dict[str, torch.Tensor] | None:
    """Allocate the complete state of a parameter, on the ranks that have a part of it."""
    if all(piece.rank != optimizer.data_parallel_group.rank() for piece in pieces):
        return None
    return {key: torch.empty(parameter.shape, dtype=torch.float32) for key in STATE}


def _collect(optimizer: Any, parameter: torch.nn.Parameter, pieces: list[StatePiece]) -> dict[str, torch.Tensor] | None:
    """Return the complete state of a parameter on the rank that has most of it, None on others.

    All ranks that have a part must call. Parts of other ranks are collected on the host: for a large model they would
    not fit on a GPU.
    """
    group = optimizer.data_parallel_group
    local = next((piece for piece in pieces if piece.rank == group.rank()), None)
    if local is None:
        return None
    existing = optimizer._get_main_param_and_optimizer_states(parameter)
    if len(pieces) == 1:
        return {key: existing[key].detach() for key in STATE}
    part = torch.stack([existing[key].detach() for key in STATE])
    owner = max(pieces, key=lambda piece: (piece.size, -piece.rank))
    if local != owner:
        torch.distributed.send(part, torch.distributed.get_global_rank(group, owner.rank), group)
        return None
    complete = {key: torch.empty(parameter.numel(), dtype=part.dtype) for key in STATE}
    for piece in pieces:
        if piece != local:
            found = part.new_empty(len(STATE), piece.size)
            torch.distributed.recv(found, torch.distributed.get_global_rank(group, piece.rank), group)
        else:
            found = part
        for tensor, values in zip(complete.values(), found.cpu()):
            tensor[piece.start : piece.end] = values
    return complete


def _sharded_tensor(model: Any, key: str, data: torch.Tensor, optimizer: Any, is_main: bool) -> Any:
    """Return the sharded tensor of a state.

    Of the ranks of a data parallel group that have it, one must be the main replica, as Megatron requires; when saving,
    there is only one.
    """
    replica: Any = model.replica_id
    if is_main:
        replica = (*replica[:2], optimizer.distributed_optimizer_instance_id)
    fields = {"key": f"optimizer.state.{key}.{model.key}", "data": data, "replica_id": replica}
    if not isinstance(model, ShardedTensorFactory):
        fields["dtype"] = data.dtype
    return replace(model, **fields)
