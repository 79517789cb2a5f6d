"""What the layers of a model do to their input under tensor parallelism, for products of ours that stand for them."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


def is_split() -> bool:
    return bool(parallel_state.get_tensor_model_parallel_world_size() > 1)


def whole_input(x: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """As ColumnParallelLinear has it (megatron/core/tensor_parallel/layers.py): every position on every rank, and its
    gradient the sum of what the ranks' parts of a weight make. Shape: (positions, batch, width), under sequence
    parallelism a rank's own of the positions."""
    whole: torch.Tensor = (
        gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
        if sequence_parallel
        else copy_to_tensor_model_parallel_region(x)
    )
    return whole
