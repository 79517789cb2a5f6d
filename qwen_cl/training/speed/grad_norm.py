"""Compute the gradient norm and clip all gradients at once, without waiting for the GPU.

Without Transformer Engine and apex, megatron/core/utils.py computes the norm of one gradient after another and waits
for the GPU after each (``local_multi_tensor_l2_norm``), then scales them one by one. With them it still waits for the
norm, to decide whether to clip (megatron/core/optimizer/clip_grads.py), and the GPU is idle until the optimizer's
kernels are launched. Before that it waits for the number of loss tokens (``finalize_model_grads``) and for a NaN check
of each bucket (``check_grads``); here a NaN shows in the norm, which is read with the loss and ends the run
(qwen_cl/training/callbacks/metrics.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel.utils import get_pp_last_rank
from megatron.core.utils import get_data_parallel_group_if_dtensor, get_model_config
from torch.nn.utils import get_total_norm

from qwen_cl.patches.registry import replace

_stock_norm, _stock_clip = clip_grads.get_grad_norm_fp32, clip_grads.clip_grad_by_total_norm_fp32


def install(model: Any) -> int:
    """Replace norm and clipping where Megatron uses its own fallback for a missing library; return how many of the
    two."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.ddp_config.check_for_nan_in_grad = False
    config = get_model_config(model[0])
    config.finalize_model_grads_func = partial(_finalize, config.finalize_model_grads_func)
    if clip_grads.l2_norm_impl.__module__ == "megatron.core.utils":
        replace(clip_grads, "l2_norm_impl", _l2_norm)
        replace(optimizer, "get_grad_norm_fp32", _norm)
    if clip_grads.multi_tensor_scale_impl.__module__ == "megatron.core.utils":
        replace(clip_grads, "multi_tensor_scale_impl", _scale)
        replace(optimizer, "clip_grad_by_total_norm_fp32", _clip)
    return (clip_grads.l2_norm_impl is _l2_norm) + (clip_grads.multi_tensor_scale_impl is _scale)


def _finalize(stock: Any, model: Any, num_tokens: torch.Tensor | None = None, *rest: Any, **more: Any) -> None:
    """Run ``finalize_model_grads`` without its wait: divide by the loss tokens of all ranks, or by 1 without any."""
    stock(model, None, *rest, **more)
    if num_tokens is None:
        return
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.broadcast(num_tokens, src=get_pp_last_rank(pipeline), group=pipeline)
    torch.distributed.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for part in model:
        part.scale_gradients(1.0 / num_tokens.clamp(min=1))


def _norm(grads_for_norm: Any, norm_type: float = 2, grad_stats_parallel_group: Any = None) -> Any:
    """Replace ``get_grad_norm_fp32``; the norm of gradients on a GPU is a tensor of shape () there."""
    grads = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else list(grads_for_norm)
    elsewhere = any(get_data_parallel_group_if_dtensor(grad) is not None for grad in grads)
    if norm_type != 2 or elsewhere or not all(grad.is_cuda for grad in grads) or not grads:
        return _stock_norm(grads_for_norm, norm_type, grad_stats_parallel_group)
    return norm_on_device(grads, grad_stats_parallel_group)


def norm_on_device(grads: Sequence[torch.Tensor], group: Any) -> torch.Tensor:
    """Return the Euclidean norm over the gradients of all ranks of the group; shape ()."""
    squared = get_total_norm(grads).float() ** 2
    torch.distributed.all_reduce(squared, group=group)
    return squared.sqrt()


def _clip(parameters: Any, max_norm: float, total_norm: Any, use_decoupled_grad: bool = False) -> None:
    if not isinstance(total_norm, torch.Tensor) or use_decoupled_grad:
        _stock_clip(parameters, max_norm, total_norm, use_decoupled_grad)
        return
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    scale_on_device([parameter.grad for parameter in parameters if parameter.grad is not None], max_norm, total_norm)


def scale_on_device(grads: Sequence[torch.Tensor], max_norm: float, total_norm: torch.Tensor) -> None:
    """Clip in place, multiplying by 1 if there is nothing to clip, as the norm is not known on the host."""
    torch._foreach_mul_(list(grads), (max_norm / (total_norm + 1e-6)).clamp(max=1.0))


def _l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Replace ``amp_C.multi_tensor_l2norm``: one norm of all tensors, shape (1,), on their device."""
    return get_total_norm(tensor_lists[0]).float().reshape(1), None


def _scale(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float | torch.Tensor
) -> None:
    """Replace ``amp_C.multi_tensor_scale``: the second list becomes the first times ``scale``."""
    source, destination = tensor_lists
    torch._foreach_copy_(destination, torch._foreach_mul(source, scale))
