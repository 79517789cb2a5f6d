"""Compute the output layer and its cross entropy together, one chunk of tokens at a time.

The logits of a whole micro batch are by far the largest tensor of a small model: tokens x vocabulary, stored in fp32
beside the softmax. Here they exist only for a chunk of tokens, whose gradient is computed at once (Liger, arXiv
2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from qwen_cl.config.speed import LOSS_CHUNK_BYTES
from qwen_cl.patches.registry import replace
from qwen_cl.training.model.loss import IGNORE_INDEX
from qwen_cl.training.speed.tensor_parallel import gather_input


def install(model: torch.nn.Module, compiled: bool) -> int:
    """Fuse every unmodified output layer with its loss; return their number."""
    parts = [module for module in model.modules() if isinstance(module, GPTModel) and module.post_process]
    parts = [part for part in parts if not part.mtp_process and not _is_changed(part.output_layer)]
    for part in parts:
        replace(part, "_postprocess", MethodType(_postprocess(part._postprocess, compiled), part))
    return len(parts)


def _is_changed(layer: ColumnParallelLinear) -> bool:
    """Return whether the layer has hooks other than the mask of the padded vocabulary, which only some ranks have."""
    padded = layer.vocabulary_rows < layer.output_size_per_partition
    return len(layer._forward_hooks) > padded


def _postprocess(stock: Any, compiled: bool) -> Any:
    def postprocess(
        self: GPTModel,
        hidden_states: torch.Tensor,
        *others: Any,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Return the losses, shape (batch, positions), like labels.

        Shape of hidden_states: (positions, batch, width). Under sequence parallelism a rank has its own positions.
        """
        if labels is None:
            out: torch.Tensor = stock(hidden_states, *others, labels=labels, **options)
            return out
        tied = self.share_embeddings_and_output_weights
        hidden = gather_input(hidden_states, self.output_layer.sequence_parallel)
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        rows = self.output_layer.vocabulary_rows
        losses = linear_cross_entropy(
            hidden.flatten(0, 1),
            weight if rows == len(weight) else weight[:rows],
            labels.t().flatten(),
            compiled,
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_tensor_model_parallel_rank() * len(weight),
        )
        return losses.view(hidden.shape[:2]).t().contiguous()

    return postprocess


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    compiled: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Return the loss of each token in nats: fp32, shape (tokens,), 0 where the label is IGNORE_INDEX.

    Shapes: hidden (tokens, width), weight (vocabulary, width), labels (tokens,). Only the sum of the losses, times any
    factor, may be differentiated: the gradients are computed before the factor is known. With a group, ``weight`` is
    this rank's part of the vocabulary, which starts at label ``first``, and hidden's gradient is that of this part.
    """
    losses: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, compiled, group, first)  # type: ignore[no-untyped-call]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        compiled: bool,
        group: torch.distributed.ProcessGroup | None,
        first: int,
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        score = _scoring(needs_hidden or needs_weight, compiled, group, first)
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
        ctx.weight_type, ctx.compiled = weight.dtype, compiled
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient, labels = ctx.saved_tensors
        has_loss = labels != IGNORE_INDEX
        factor = (gradients[0] * has_loss).sum() / has_loss.sum().clamp(min=1)  # the same for all loss tokens
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * factor.to(hidden_gradient.dtype)
        if weight_gradient is not None:
            weight_gradient = _run(ctx.compiled)(_scaled, weight_gradient, factor, ctx.weight_type)
        return hidden_gradient, weight_gradient, None, None, None, None


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
    return (gradient * factor).to(wanted)


def _chunk_size(tokens: int, weight: torch.Tensor) -> int:
    """Return the tokens per chunk: as few chunks as possible, of equal size except for rounding."""
    most = max(1, LOSS_CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    chunks = -(-tokens // most)
    return -(-tokens // chunks) if chunks else 1


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a matmul in fp32, also with factors of a lower precision if this PyTorch supports it."""
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


def _scoring(
    with_gradient: bool, compiled: bool, group: torch.distributed.ProcessGroup | None, first: int
) -> Callable[[torch.Tensor, torch.Tensor], Scored]:
    """Return a function from logits and labels to the losses and the gradient of their sum, in the logits' dtype."""
    if group is not None and group.size() > 1:
        return partial(_across_ranks, group=group, first=first, with_gradient=with_gradient, run=_run(compiled))
    if not with_gradient:
        return _losses_only
    return partial(_run(compiled), _losses_and_gradient)


def _losses_only(logits: torch.Tensor, labels: torch.Tensor) -> Scored:
    total, label_logit = _sums(logits, labels)
    return (total - label_logit) * (labels != IGNORE_INDEX), labels


def _losses_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> Scored:
    total, label_logit = _sums(logits, labels)
    return (total - label_logit) * (labels != IGNORE_INDEX), _gradient(logits, labels, labels, total)


def _across_ranks(
    logits: torch.Tensor,
    labels: torch.Tensor,
    group: torch.distributed.ProcessGroup,
    first: int,
    with_gradient: bool,
    run: Callable[..., Any],
) -> Scored:
    """Return the losses and the gradient of a vocabulary split over ranks, which exchange two numbers per token."""
    held = labels - first  # labels of other ranks are out of range
    sums = torch.stack(run(_sums, logits, held))
    parts = sums.new_empty(group.size() * 2, len(labels))
    torch.distributed.all_gather_into_tensor(parts, sums, group=group)
    total, label_logit = parts[::2].logsumexp(0), parts[1::2].sum(0)
    losses = (total - label_logit) * (labels != IGNORE_INDEX)
    return losses, run(_gradient, logits, held, labels, total) if with_gradient else labels


def _sums(logits: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logsumexp of each token's logits, and the logit of its label, 0 if the label is on another rank."""
    column, is_local = _place(held, logits)
    return logits.float().logsumexp(-1), torch.where(is_local, logits.gather(1, column)[:, 0].float(), 0)


def _gradient(logits: torch.Tensor, held: torch.Tensor, labels: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return the gradient for the logits. The label's entry is set at the end, instead of comparing every logit."""
    has_loss = labels != IGNORE_INDEX
    total = total.masked_fill(~has_loss, torch.inf)  # all others become 0
    gradient = (logits.float() - total[:, None]).exp().to(logits.dtype)
    column, is_local = _place(held, logits)
    at_label = (logits.gather(1, column)[:, 0].float() - total).exp() - (is_local & has_loss).float()
    return gradient.scatter_(1, column, at_label[:, None].to(gradient.dtype))


def _place(held: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column of each label, shape (tokens, 1) and clamped to the range, and whether it was in the range."""
    last = logits.shape[1] - 1
    return held.clamp(0, last)[:, None], (held >= 0) & (held <= last)


def _run(compiled: bool) -> Callable[..., Any]:
    return _compiled if compiled else lambda function, *tensors: function(*tensors)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run compiled for any number of tokens and a fixed vocabulary: kernels with a dynamic row length are slow."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.dim():
            torch._dynamo.maybe_mark_dynamic(argument, 0)
    return _compilation(function)(*arguments)


@cache
def _compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
