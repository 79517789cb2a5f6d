"""The layers of the model: Transformer Engine's where it is installed, else Megatron's own with torch's attention.

NeMo's stock local layers cannot train on a GPU without apex and keep the whole score matrix; torch's
scaled_dot_product_attention picks a flash kernel and keeps nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from nemo.collections.llm.gpt.model.base import HAVE_TE, GPTConfig, local_layer_spec, transformer_engine_layer_spec


class CausalAttention(torch.nn.Module):
    """Megatron's core attention over torch's kernel. Causal always: rows are padded at their end only."""

    def __init__(self, config: GPTConfig, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Shapes: query (sequence, batch, heads, width), key and value with KV groups for heads; returns
        (sequence, batch, heads * width)."""
        sequence, batch, heads, width = query.shape
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.permute(2, 0, 1, 3).reshape(sequence, batch, heads * width)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


def layer_spec(config: GPTConfig, vp_stage: int | None = None) -> ModuleSpec:
    """What NeMo's ``transformer_layer_spec`` asks for."""
    if HAVE_TE:
        return transformer_engine_layer_spec(config)
    spec = local_layer_spec(config)
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    return spec
