"""Rewrite operations of a layer so that Inductor generates kernels that read and write each tensor once.

The values are the same. Whether a form is fast shows only in the generated code (``TORCH_LOGS=output_code``); the
comments here hold for torch 2.11. With another Inductor the results stay correct, but may be slower.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core.transformer import mlp
from megatron.core.transformer.attention import SelfAttention
from torch.nn.functional import silu

from qwen_cl.patches.registry import replace

PARTS, ALIGNED = 5, 64
"""Parts of each half of a gradient, and their alignment; Inductor writes more than 8 parts in place."""


def install(model: torch.nn.Module) -> None:
    module: Any
    for module in model.modules():
        if type(module) is SelfAttention:
            replace(module, "get_query_key_value_tensors", MethodType(_query_key_value, module))
        elif type(module) is mlp.MLP and _is_swiglu(module.config):
            module.config.bias_activation_fusion = True  # Megatron then calls:
            replace(mlp, "bias_swiglu_impl", swiglu)


def _is_swiglu(config: Any) -> bool:
    """Return whether ``MLP.forward`` computes a plain SwiGLU."""
    return (
        config.gated_linear_unit
        and config.activation_func is silu
        and not config.use_te_activation_func
        and not config.add_bias_linear
        and config.activation_func_clamp_value is None
        and not config.glu_linear_offset
    )


def _query_key_value(
    self: SelfAttention,
    hidden_states: torch.Tensor,
    key_value_states: torch.Tensor | None = None,
    split_qkv: bool = True,
    **others: Any,
) -> Any:
    """Replace ``SelfAttention.get_query_key_value_tensors``, which splits before it separates the heads.

    Inductor's kernels then divide to find each element's place, and load single elements. Shapes: (positions, batch,
    heads, width).
    """
    if not split_qkv:
        return SelfAttention.get_query_key_value_tensors(self, hidden_states, key_value_states, split_qkv, **others)
    mixed, _ = self.linear_qkv(hidden_states)
    groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
    heads = self.num_attention_heads_per_partition // groups
    parts = mixed.view(*mixed.shape[:2], groups, heads + 2, width).split((heads, 1, 1), dim=3)
    query, key, value = (part.flatten(2, 3) for part in parts)
    query = query if self.q_layernorm is None else self.q_layernorm(query)
    return query, key if self.k_layernorm is None else self.k_layernorm(key), value


def swiglu(both: torch.Tensor, bias: torch.Tensor | None, *others: Any) -> torch.Tensor:
    """Replace ``bias_swiglu_impl``. Shapes: both (…, gates and values), returns (…, values)."""
    out: torch.Tensor = _SwiGLU.apply(both if bias is None else both + bias)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    """The product silu(gate) value. For a gradient in two parts Inductor would read the inputs of both for every
    element."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        gate, value = both.chunk(2, dim=-1)
        return silu(gate) * value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        exact = torch.promote_types(both.dtype, torch.float32)
        gate, value = (half.to(exact) for half in both.chunk(2, dim=-1))
        gradient, share = gradients[0].to(exact), torch.sigmoid(gate)
        of_gate = (gradient * value * share * (1 + gate * (1 - share))).to(both.dtype)
        of_value = (gradient * gate * share).to(both.dtype)
        return concatenate_in_parts(of_gate, of_value) if both.is_cuda else torch.cat((of_gate, of_value), dim=-1)


def concatenate_in_parts(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Concatenate the two halves in parts."""
    step = -(-first.shape[-1] // (PARTS * ALIGNED)) * ALIGNED
    parts = (*torch.split(first, step, dim=-1), *torch.split(second, step, dim=-1))
    return torch.cat(parts, dim=-1)
