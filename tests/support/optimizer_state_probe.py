"""The probe that compares Megatron's gathered optimizer state with the ranks' parts. Run by ``tests.support.ranks``."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

BUCKET = 600
"""Elements per bucket, about: the last bucket is small, and some ranks have no part of a parameter."""


def main() -> None:
    from qwen_cl.training import setup

    setup.prepare(cpu=True)
    import torch
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    module, optimizer = _trained(None)
    gathered = _by_key(_stock()(optimizer, _places(module), metadata={}))
    _compare(module, optimizer, gathered)
    _compare(*_trained(BUCKET), gathered)  # with several buckets, Megatron omits the padding between them


def _stock() -> Any:
    """Megatron's own, of a copy of its module: in the other it is replaced."""
    from importlib import util

    from megatron.core.optimizer import distrib_optimizer

    specification: Any = util.spec_from_file_location(f"{distrib_optimizer.__name__}_stock", distrib_optimizer.__file__)
    copy: Any = util.module_from_spec(specification)
    specification.loader.exec_module(copy)
    stock = copy.DistributedOptimizer.sharded_param_state_fully_reshardable
    assert stock.__module__ == copy.__name__
    return stock


def _trained(bucket_size: int | None) -> tuple[Any, Any]:
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(1)
    module = torch.nn.Sequential(*(torch.nn.Linear(*sizes) for sizes in pairwise((3, 20, 30, 25, 20, 1))))
    config = TransformerConfig(num_layers=1, hidden_size=3, num_attention_heads=1)
    said = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=bucket_size is not None, bucket_size=bucket_size
    )
    model = DistributedDataParallel(config, said, module)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=0.1, use_distributed_optimizer=True), [model])
    for _ in range(2):
        model.zero_grad_buffer()
        model(torch.randn(4, 3)).square().mean().backward()
        model.finish_grad_sync()
        optimizer.step()
    return module, optimizer.chained_optimizers[0]


def _places(module: Any) -> dict[str, Any]:
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    replica = (0, 0, torch.distributed.get_rank())
    return {
        name: ShardedTensor.from_rank_offsets(name, parameter, replica_id=replica)
        for name, parameter in module.named_parameters()
    }


def _by_key(state: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return {tensor.key: tensor for tensors in state.values() for tensor in tensors.values()}


def _compare(module: Any, optimizer: Any, gathered: dict[str, Any]) -> None:
    import torch

    state = optimizer.sharded_param_state_fully_reshardable(_places(module))
    own = _by_key(state)
    for key, tensor in own.items():
        assert tensor.replica_id == (0, 0, 0)  # the rank that saves it
        torch.testing.assert_close(tensor.data, gathered[key].data, rtol=1e-5, atol=1e-7)
        assert tensor.data.any()
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, (sorted(own), sorted(state)))
    assert sorted(key for keys, _ in every for key in keys) == sorted(gathered), every
    assert sum(bool(keys) for keys, _ in every) >= min(2, len(every)), "one rank has all: this shows little"
    numbers = sorted(number for _, numbers in every for number in numbers)
    wanted = optimizer.sharded_param_state_fully_reshardable(_places(module), is_loading=True)
    assert numbers == list(range(len(numbers)))
    assert set(state) <= set(wanted) <= set(numbers)
    spoken = [tensor.key for tensor in _by_key(wanted).values() if tensor.replica_id == (0, 0, 0)]
    torch.distributed.all_gather_object(every, spoken)
    assert sorted(key for keys in every for key in keys) == sorted(gathered), every
