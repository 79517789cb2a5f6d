"""LoRA's two thin products, joined with the product of the layer they adapt.

Apart, the adapter's output is another tensor as wide as the layer's, written, read and added; joined, the thin product
is some more columns of the wide one, which cost next to nothing.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from nemo.collections.llm.peft.lora import LoRALinear

ALIGNED = 8
"""Columns of bf16 that fill 16 bytes, which fast kernels for products ask of every row."""


def join_products(model: torch.nn.Module) -> int:
    """In every adapted layer that allows it; returns how many. Weights stay where they are, under their names."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return 0
    joined = [module for module in model.modules() if type(module) is LoRALinear and _can_be_joined(module)]
    for module in joined:
        module.forward = MethodType(_forward, module)
    return len(joined)


def _can_be_joined(module: LoRALinear) -> bool:
    layer, adapter = module.to_wrap, module.adapter
    return (
        type(layer) in (ColumnParallelLinear, RowParallelLinear)
        and not layer.weight.requires_grad
        and not (layer.skip_bias_add and layer.bias is not None)
        and isinstance(adapter.activation, torch.nn.Identity)
        and adapter.dropout is None
        and not layer._forward_hooks
    )


def _forward(self: LoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, None]:
    layer, adapter = self.to_wrap, self.adapter
    down, up = adapter.linear_in.weight, adapter.linear_out.weight
    scale = adapter.alpha / adapter.dim
    out = _JoinedProducts.apply(x.flatten(0, -2), layer.weight, layer.bias, down, up, scale)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1), None


class _JoinedProducts(torch.autograd.Function):
    """x W' + b + scale x D' U'. Shapes: x (tokens, in), weight W (out, in), down D (rank, in), up U (out, rank).

    The thin columns are joined to whichever side saves the wider tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        thin = (x @ down.t()) * scale
        ctx.save_for_backward(x, thin, weight, down, up)
        ctx.scale, ctx.has_bias = scale, bias is not None
        if _widens(weight, thin):
            joined, rows = torch.cat((x, thin), 1), torch.cat((weight, up), 1)
            return joined @ rows.t() if bias is None else torch.addmm(bias, joined, rows.t())
        out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        return torch.addmm(out, thin, up.t())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, thin, weight, down, up = ctx.saved_tensors
        gradient = gradients[0]
        if _widens(weight, thin):
            both = gradient @ torch.cat((weight, up), 1)
            of_x, of_thin = both[:, : weight.shape[1]], both[:, weight.shape[1] :] * ctx.scale
            of_x = torch.addmm(of_x, of_thin, down)
        else:
            of_thin = (gradient @ up) * ctx.scale
            if weight.shape[0] < weight.shape[1] and not thin.shape[1] % ALIGNED:
                of_x = torch.cat((gradient, of_thin), 1) @ torch.cat((weight, down), 0)
            else:
                of_x = torch.addmm(gradient @ weight, of_thin, down)
        return of_x, None, None, of_thin.t() @ x, gradient.t() @ thin, None


def _widens(weight: torch.Tensor, thin: torch.Tensor) -> bool:
    return weight.shape[0] > weight.shape[1] and not thin.shape[1] % ALIGNED
