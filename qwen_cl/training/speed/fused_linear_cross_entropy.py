"""The output layer and its cross entropy together, some tokens at a time.

Logits of a whole micro batch are the largest tensor of a small model by far: tokens x vocabulary, kept in fp32 beside
the softmax. Here they exist for a chunk of tokens only, whose gradient is made at once (Liger, arXiv 2410.10989,
section 3.2).
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
from qwen_cl.training.speed.tensor_parallel import whole_input


def install(model: torch.nn.Module, compiled: bool) -> int:
    """In every part of the model that has an unchanged output layer of its own; returns how many."""
    parts = [module for module in model.modules() if isinstance(module, GPTModel) and module.post_process]
    parts = [part for part in parts if not part.mtp_process and not _is_changed(part.output_layer)]
    for part in parts:
        replace(part, "_postprocess", MethodType(_postprocess(part._postprocess, compiled), part))
    return len(parts)


def _is_changed(layer: ColumnParallelLinear) -> bool:
    """By something else than what keeps padding out of the softmax, which only some ranks have."""
    padded = layer.kept_rows < layer.output_size_per_partition
    return len(layer._forward_hooks) > padded


def _postprocess(stock: Any, compiled: bool) -> Any:
    def postprocess(
        self: GPTModel,
        hidden_states: torch.Tensor,
        *others: Any,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Shapes: hidden_states (positions, batch, width), labels (batch, positions), as the losses. Under sequence
        parallelism a rank comes with its own of the positions."""
        if labels is None:
            out: torch.Tensor = stock(hidden_states, *others, labels=labels, **options)
            return out
        tied = self.share_embeddings_and_output_weights
        hidden = whole_input(hidden_states, self.output_layer.sequence_parallel)
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        kept = self.output_layer.kept_rows
        losses = linear_cross_entropy(
            hidden.flatten(0, 1),
            weight if kept == len(weight) else weight[:kept],
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
    """Nats of each token, fp32, shape (tokens,); 0 where the label is NOT_COUNTED.

    Shapes: hidden (tokens, width), weight (vocabulary, width), labels (tokens,). Only the sum of the losses may be
    differentiated, times whatever factor: the gradients are made before it is known. With a group, ``weight`` is this
    rank's part of the vocabulary, from label ``first`` on, and hidden's gradient is what this part makes.
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
        counted = labels != IGNORE_INDEX
        factor = (gradients[0] * counted).sum() / counted.sum().clamp(min=1)  # the same for all that count
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * factor.to(hidden_gradient.dtype)
        if weight_gradient is not None:
            weight_gradient = _run(ctx.compiled)(_scaled, weight_gradient, factor, ctx.weight_type)
        return hidden_gradient, weight_gradient, None, None, None, None


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
    return (gradient * factor).to(wanted)


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


def _scoring(
    with_gradient: bool, compiled: bool, group: torch.distributed.ProcessGroup | None, first: int
) -> Callable[[torch.Tensor, torch.Tensor], Scored]:
    """Of logits and labels the losses, and the gradient of their sum for the logits, in the logits' type."""
    if group is not None and group.size() > 1:
        return partial(_of_all_parts, group=group, first=first, with_gradient=with_gradient, run=_run(compiled))
    if not with_gradient:
        return _losses_only
    return partial(_run(compiled), _losses_and_gradient)


def _losses_only(logits: torch.Tensor, labels: torch.Tensor) -> Scored:
    total, own = _sums(logits, labels)
    return (total - own) * (labels != IGNORE_INDEX), labels


def _losses_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> Scored:
    total, own = _sums(logits, labels)
    return (total - own) * (labels != IGNORE_INDEX), _gradient(logits, labels, labels, total)


def _of_all_parts(
    logits: torch.Tensor,
    labels: torch.Tensor,
    group: torch.distributed.ProcessGroup,
    first: int,
    with_gradient: bool,
    run: Callable[..., Any],
) -> Scored:
    """Of the parts of a row that ranks hold, two numbers a token are exchanged."""
    held = labels - first  # those of other parts are below 0 or above the last
    sums = torch.stack(run(_sums, logits, held))
    parts = sums.new_empty(group.size() * 2, len(labels))
    torch.distributed.all_gather_into_tensor(parts, sums, group=group)
    total, own = parts[::2].logsumexp(0), parts[1::2].sum(0)
    losses = (total - own) * (labels != IGNORE_INDEX)
    return losses, run(_gradient, logits, held, labels, total) if with_gradient else labels


def _sums(logits: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token the logsumexp of its logits, and the logit of its label, 0 where that is not among them."""
    at, there = _place(held, logits)
    return logits.float().logsumexp(-1), torch.where(there, logits.gather(1, at)[:, 0].float(), 0)


def _gradient(logits: torch.Tensor, held: torch.Tensor, labels: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The label's own is put in afterwards, in place of a comparison for every logit."""
    counted = labels != IGNORE_INDEX
    total = total.masked_fill(~counted, torch.inf)  # all others become 0
    gradient = (logits.float() - total[:, None]).exp().to(logits.dtype)
    at, there = _place(held, logits)
    own = (logits.gather(1, at)[:, 0].float() - total).exp() - (there & counted).float()
    return gradient.scatter_(1, at, own[:, None].to(gradient.dtype))


def _place(held: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token's label its column, of shape (tokens, 1) and any where there is none, and whether there is."""
    last = logits.shape[1] - 1
    return held.clamp(0, last)[:, None], (held >= 0) & (held <= last)


def _run(compiled: bool) -> Callable[..., Any]:
    return _compiled if compiled else lambda function, *tensors: function(*tensors)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """For any number of tokens at once, and for this vocabulary alone: kernels whose row length is open are slow."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.dim():
            torch._dynamo.maybe_mark_dynamic(argument, 0)
    return _compilation(function)(*arguments)


@cache
def _compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
