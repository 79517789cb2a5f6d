"""The output layer and its cross entropy together, some tokens at a time.

Logits of a whole micro batch are the largest tensor of a small model by far: tokens x vocabulary, kept in fp32 beside
the softmax. Here they exist for a chunk of tokens only, whose gradient is made at once (Liger, arXiv 2410.10989,
section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from qwen_cl.levers import LOSS_CHUNK_BYTES
from qwen_cl.megatron.steps import NOT_COUNTED


def install(model: torch.nn.Module, compiled: bool) -> int:
    """In every part of the model that has an output layer of its own, whole and unchanged; returns how many."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return 0
    parts = [module for module in model.modules() if isinstance(module, GPTModel) and module.post_process]
    parts = [part for part in parts if not part.mtp_process and not part.output_layer._forward_hooks]
    for part in parts:
        part._postprocess = MethodType(_postprocess(part._postprocess, compiled), part)
    return len(parts)


def _postprocess(stock: Any, compiled: bool) -> Any:
    def postprocess(
        self: GPTModel,
        hidden_states: torch.Tensor,
        *others: Any,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Shapes: hidden_states (positions, batch, width), labels (batch, positions), as the losses."""
        if labels is None:
            out: torch.Tensor = stock(hidden_states, *others, labels=labels, **options)
            return out
        tied = self.share_embeddings_and_output_weights
        losses = linear_cross_entropy(
            hidden_states.flatten(0, 1),
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels.t().flatten(),
            compiled,
        )
        return losses.view(hidden_states.shape[:2]).t().contiguous()

    return postprocess


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, compiled: bool = False
) -> torch.Tensor:
    """Nats of each token, fp32, shape (tokens,); 0 where the label is NOT_COUNTED.

    Shapes: hidden (tokens, width), weight (vocabulary, width), labels (tokens,). Only the sum of the losses may be
    differentiated, times whatever factor: the gradients are made before it is known.
    """
    losses: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, compiled)  # type: ignore[no-untyped-call]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        compiled: bool,
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        score = _scoring(needs_hidden or needs_weight, compiled)
        size = _chunk_size(len(hidden), weight)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            logits = hidden[chunk] @ weight.t()
            losses[chunk], gradient = score(logits, labels[chunk])
            del logits
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[chunk])
            if weight_gradient is not None:
                _add_product(weight_gradient, gradient.t(), hidden[chunk])
        ctx.save_for_backward(hidden_gradient, weight_gradient, labels)
        ctx.weight_type = weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient, labels = ctx.saved_tensors
        counted = labels != NOT_COUNTED
        factor = (gradients[0] * counted).sum() / counted.sum().clamp(min=1)  # the same for all that count
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * factor.to(hidden_gradient.dtype)
        if weight_gradient is not None:
            weight_gradient = (weight_gradient * factor).to(ctx.weight_type)
        return hidden_gradient, weight_gradient, None, None


def _chunk_size(tokens: int, weight: torch.Tensor) -> int:
    """Tokens of each of as few chunks as there can be, all alike but for rounding."""
    most = max(1, LOSS_CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    chunks = -(-tokens // most)
    return -(-tokens // chunks) if chunks else 1


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """In fp32, also where the factors are not, if this PyTorch's product can."""
    if left.dtype is not torch.float32 and _adds_in_fp32(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


@cache
def _adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        factor = torch.ones(16, 16, device=device, dtype=dtype)
        total = torch.ones(16, 16, device=device)
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())


Scored = tuple[torch.Tensor, torch.Tensor]


def _losses_only(logits: torch.Tensor, labels: torch.Tensor) -> Scored:
    counted = labels != NOT_COUNTED
    logits = logits.float()
    losses = logits.logsumexp(-1) - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return losses * counted, labels


def _losses_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> Scored:
    """The gradient of the losses' sum for the logits, in the logits' type."""
    counted = labels != NOT_COUNTED
    scores = logits.float()
    total = scores.logsumexp(-1)
    losses = total - scores.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    hit = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    gradient = ((scores - total[:, None]).exp() - hit.float()) * counted[:, None]
    return losses * counted, gradient.to(logits.dtype)


def _scoring(with_gradient: bool, compiled: bool) -> Callable[..., Scored]:
    if not with_gradient:
        return _losses_only
    return _compiled_losses_and_gradient if compiled else _losses_and_gradient


@cache
def _compiled() -> Callable[..., Scored]:
    return torch.compile(_losses_and_gradient)


def _compiled_losses_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> Scored:
    """For any number of tokens at once, and for this vocabulary alone: kernels whose row length is open are slow."""
    for tensor in (logits, labels):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled()(logits, labels)
