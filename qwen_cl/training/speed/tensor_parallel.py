"""Handle a layer's input under tensor parallelism, for matmuls that replace those of the layer."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


def is_split() -> bool:
    return bool(parallel_state.get_tensor_model_parallel_world_size() > 1)


def gather_input(x: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """Return the input as ColumnParallelLinear has it: all positions on every rank, with the gradient summed over
    ranks.

    Shape: (positions, batch, width); under sequence parallelism x has this rank's positions.
    """
    gathered: torch.Tensor = (
        gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
        if sequence_parallel
        else copy_to_tensor_model_parallel_region(x)
    )
    return gathered
