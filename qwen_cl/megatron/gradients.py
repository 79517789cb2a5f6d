"""Megatron's norm and scaling of gradients, for all of them at once.

Without Transformer Engine and apex, megatron/core/utils.py takes the norm of one gradient after another and waits for
the GPU after each (``local_multi_tensor_l2_norm``), then multiplies them one by one.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import clip_grads
from torch.nn.utils import get_total_norm


def install() -> int:
    """In place of Megatron's own for want of a library, never of a library's; idempotent. Returns how many are ours."""
    if clip_grads.l2_norm_impl.__module__ == "megatron.core.utils":
        clip_grads.l2_norm_impl = _l2_norm
    if clip_grads.multi_tensor_scale_impl.__module__ == "megatron.core.utils":
        clip_grads.multi_tensor_scale_impl = _scale
    return (clip_grads.l2_norm_impl is _l2_norm) + (clip_grads.multi_tensor_scale_impl is _scale)


def _l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """As ``amp_C.multi_tensor_l2norm``: of all tensors together, shape (1,), left on its device."""
    return get_total_norm(tensor_lists[0]).float().reshape(1), None


def _scale(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float | torch.Tensor
) -> None:
    """As ``amp_C.multi_tensor_scale``: the second list becomes the first times ``scale``."""
    source, destination = tensor_lists
    torch._foreach_copy_(destination, torch._foreach_mul(source, scale))
