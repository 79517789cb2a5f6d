"""The distributed optimizer's state in a checkpoint, for any layout to go on with, straight from where it is.

The names and shapes in the checkpoint are those of ``DistributedOptimizer.sharded_param_state_fully_reshardable``
(megatron-core 0.15): of each parameter its fp32 copy and Adam's two moments, whole. To make them, Megatron copies the
state to the host, gathers all of it on every rank of the data parallel group, and copies it twice more, while training
waits: for 0.5B parameters in one process on two cores, 18 s, when 13 GB more were taken and memory was out. But nearly
every parameter is whole on one rank already. Here that rank gives what it has; of those few that the ranks' shares cut,
the rank with the largest part collects the others.
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
    """What of a parameter, flattened, one rank of the data parallel group has."""

    rank: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def pieces_of(start: int, end: int, bucket_start: int, share: int) -> list[StatePiece]:
    """Of a parameter at ``start`` to ``end`` of a buffer, in a bucket of which each rank has ``share`` elements."""
    first, last = (start - bucket_start) // share, (end - 1 - bucket_start) // share
    edges = [start, *(bucket_start + rank * share for rank in range(first + 1, last + 1)), end]
    return [StatePiece(first + n, edges[n] - start, edges[n + 1] - start) for n in range(last - first + 1)]


def _sharded_state(
    self: Any, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, Any]]:
    """In place of Megatron's; the keys count the parameters, and each rank has those of its own."""
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_parameter = {each.data: each for each in nested_values(sharded)}
    state = {}
    for number, (parameter, pieces) in enumerate(_parameters(self)):
        whole = _room(self, parameter, pieces) if is_loading else _collect(self, parameter, pieces)
        if whole is not None:
            speaks = not is_loading or pieces[0].rank == self.data_parallel_group.rank()
            state[number] = {
                key: _as(of_parameter[parameter], key, tensor.view(parameter.shape), self, speaks)
                for key, tensor in whole.items()
            }
    return state


def _parameters(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, list[StatePiece]]]:
    """In the order in which Megatron's loading counts them."""
    ranks = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket_number) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_number]
            yield parameter, pieces_of(start, end, bucket.offset, bucket.grad_data.numel() // ranks)


def _room(optimizer: Any, parameter: torch.nn.Parameter, pieces: list[StatePiece]) -> dict[str, torch.Tensor] | None:
    """For the whole state of a parameter, on the ranks that have a part of it."""
    if all(piece.rank != optimizer.data_parallel_group.rank() for piece in pieces):
        return None
    return {key: torch.empty(parameter.shape, dtype=torch.float32) for key in STATE}


def _collect(optimizer: Any, parameter: torch.nn.Parameter, pieces: list[StatePiece]) -> dict[str, torch.Tensor] | None:
    """The whole state of a parameter on the rank that has most of it, None on others; ranks that have a part call at
    the same time. What came from others is on the host: of a large model it is too much for a GPU."""
    group = optimizer.data_parallel_group
    own = next((piece for piece in pieces if piece.rank == group.rank()), None)
    if own is None:
        return None
    there = optimizer._get_main_param_and_optimizer_states(parameter)
    if len(pieces) == 1:
        return {key: there[key].detach() for key in STATE}
    part = torch.stack([there[key].detach() for key in STATE])
    owner = max(pieces, key=lambda piece: (piece.size, -piece.rank))
    if own != owner:
        torch.distributed.send(part, torch.distributed.get_global_rank(group, owner.rank), group)
        return None
    whole = {key: torch.empty(parameter.numel(), dtype=part.dtype) for key in STATE}
    for piece in pieces:
        if piece != own:
            found = part.new_empty(len(STATE), piece.size)
            torch.distributed.recv(found, torch.distributed.get_global_rank(group, piece.rank), group)
        else:
            found = part
        for tensor, values in zip(whole.values(), found.cpu()):
            tensor[piece.start : piece.end] = values
    return whole


def _as(model: Any, key: str, data: torch.Tensor, optimizer: Any, speaks: bool) -> Any:
    """The place of a state's tensor in the checkpoint. Of the ranks of a data parallel group that have it one speaks
    for it, as Megatron asks of each tensor: to save, there is but one."""
    replica: Any = model.replica_id
    if speaks:
        replica = (*replica[:2], optimizer.distributed_optimizer_instance_id)
    said = {"key": f"optimizer.state.{key}.{model.key}", "data": data, "replica_id": replica}
    if not isinstance(model, ShardedTensorFactory):
        said["dtype"] = data.dtype
    return replace(model, **said)
