"""Fuse LoRA's two low-rank matmuls with the matmul of the adapted layer.

Separately, the adapter's output is another tensor as wide as the layer's that is written, read and added; fused, it is
some more columns of the wide matmul, which cost almost nothing. Under tensor parallelism the adapter also communicates
what the layer communicates anyway: its input's gradient, or its output. Fused, they are sent together, and only tensors
of the width of the rank are sent for the adapter alone.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from nemo.collections.llm.peft.lora import LoRALinear
from nemo.collections.llm.peft.utils import ParallelLinearAdapter
from torch.nn.functional import linear

from qwen_cl.patches.registry import replace
from qwen_cl.training.speed.tensor_parallel import gather_input, is_split

ALIGNED = 8
"""Columns of bf16 in 16 bytes, the alignment of rows that fast matmul kernels need."""


def fuse_lora(model: torch.nn.Module) -> int:
    """Fuse every adapted layer that allows it; return their number. Weights keep their places and names."""
    joined = [module for module in model.modules() if type(module) is LoRALinear and _can_be_fused(module)]
    for module in joined:
        by_rows = isinstance(module.to_wrap, ColumnParallelLinear)
        of_a_part = _forward_column_parallel if by_rows else _forward_row_parallel
        replace(module, "forward", MethodType(of_a_part if is_split() else _forward, module))
    return len(joined)


def _can_be_fused(module: LoRALinear) -> bool:
    layer, adapter = module.to_wrap, module.adapter
    return (
        type(layer) in (ColumnParallelLinear, RowParallelLinear)
        and not layer.weight.requires_grad
        and not (layer.skip_bias_add and layer.bias is not None)
        and isinstance(adapter.activation, torch.nn.Identity)
        and adapter.dropout is None
        and not adapter.use_a2a
        and not layer._forward_hooks
    )


def _forward(self: LoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, None]:
    layer, adapter = self.to_wrap, self.adapter
    down, up = adapter.linear_in.weight, adapter.linear_out.weight
    scale = adapter.alpha / adapter.dim
    out = fused_matmuls(x.flatten(0, -2), layer.weight, layer.bias, down, up, scale)
    return out.view(*x.shape[:-1], -1), None


def _forward_column_parallel(self: LoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Run a column parallel layer, of which a rank has rows of weight, down and up. Shape of x: (positions, batch,
    in)."""
    layer, adapter = self.to_wrap, self.adapter
    x = gather_input(x, layer.sequence_parallel)
    thin = mappings.gather_from_tensor_model_parallel_region(linear(x, adapter.linear_in.weight))
    return _added(linear(x, layer.weight, layer.bias), thin, adapter, first=0), None


def _forward_row_parallel(self: LoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Run a row parallel layer, of which a rank has columns of weight and down, and rows of up.

    Shape of x: (positions, batch, a rank's part of in).
    """
    layer, adapter = self.to_wrap, self.adapter
    thin = mappings.reduce_from_tensor_model_parallel_region(linear(x, adapter.linear_in.weight))
    first = parallel_state.get_tensor_model_parallel_rank() * len(adapter.linear_out.weight)
    out = _added(linear(x, layer.weight), thin, adapter, first)
    if layer.sequence_parallel:
        out = mappings.reduce_scatter_to_sequence_parallel_region(out)
    else:
        out = mappings.reduce_from_tensor_model_parallel_region(out)
    return out if layer.bias is None else out + layer.bias, None


def _added(out: torch.Tensor, thin: torch.Tensor, adapter: ParallelLinearAdapter, first: int) -> torch.Tensor:
    thin = mappings.copy_to_tensor_model_parallel_region(thin) * (adapter.alpha / adapter.dim)
    total: torch.Tensor = _AddMatmul.apply(out, thin, adapter.linear_out.weight, first)  # type: ignore[no-untyped-call]
    return total


class _AddMatmul(torch.autograd.Function):
    """The sum of ``out`` and thin U' in the columns from ``first`` on, in place."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, thin: torch.Tensor, up: torch.Tensor, first: int) -> torch.Tensor:
        ctx.save_for_backward(thin, up)
        ctx.first = first
        ctx.mark_dirty(out)
        out.flatten(0, -2).narrow(1, first, len(up)).addmm_(thin.flatten(0, -2), up.t())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        thin, up = ctx.saved_tensors
        columns = gradients[0].narrow(-1, ctx.first, len(up))
        return gradients[0], columns @ up, columns.flatten(0, -2).t() @ thin.flatten(0, -2), None


def fused_matmuls(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return x W' + b + scale x D' U'. The weight and the bias get no gradient.

    Shapes: x (tokens, in), weight W (out, in), down D (rank, in), up U (out, rank).
    """
    out: torch.Tensor = _FusedMatmuls.apply(x, weight, bias, down, up, scale)  # type: ignore[no-untyped-call]
    return out


class _FusedMatmuls(torch.autograd.Function):
    """The autograd function of ``fused_matmuls``.

    The low-rank columns are concatenated on the side that saves the wider tensor.
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
        return _plus_product(out, thin, up.t())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, thin, weight, down, up = ctx.saved_tensors
        gradient = gradients[0]
        if _widens(weight, thin):
            both = gradient @ torch.cat((weight, up), 1)
            of_x, of_thin = both[:, : weight.shape[1]], both[:, weight.shape[1] :] * ctx.scale
            of_x = _plus_product(of_x, of_thin, down)
        else:
            of_thin = (gradient @ up) * ctx.scale
            if weight.shape[0] < weight.shape[1] and not thin.shape[1] % ALIGNED:
                of_x = torch.cat((gradient, of_thin), 1) @ torch.cat((weight, down), 0)
            else:
                of_x = _plus_product(gradient @ weight, of_thin, down)
        return of_x, None, None, of_thin.t() @ x, gradient.t() @ thin, None


def _plus_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add a matmul, in place outside of graphs.

    In a graph the sum is fused into the next kernel, while addmm would first copy ``total``: Inductor has no matmul
    that accumulates in place.
    """
    return total + left @ right if torch.compiler.is_compiling() else total.addmm_(left, right)


def _widens(weight: torch.Tensor, thin: torch.Tensor) -> bool:
    return weight.shape[0] > weight.shape[1] and not thin.shape[1] % ALIGNED
