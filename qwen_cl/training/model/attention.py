"""Choose the model's layers: Transformer Engine's if it is installed, else Megatron's with torch's attention.

NeMo's stock local layers cannot train on a GPU without apex, and store the whole score matrix; torch's
scaled_dot_product_attention uses a flash kernel, which does not.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec
from nemo.collections.llm.gpt.model.base import HAVE_TE, GPTConfig, local_layer_spec, transformer_engine_layer_spec
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from qwen_cl.training.model.context_parallel import attend_across_ranks


class CausalAttention(torch.nn.Module):
    """The core attention of Megatron's layers with torch's kernels. Always causal: sequences are padded at their end
    only."""

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
        """Compute causal attention.

        Shapes: query (sequence, batch, heads, width), key and value with KV groups for heads; returns (sequence, batch,
        heads * width).

        ``attention_mask`` is not a mask but the ``segments`` of a packed batch (qwen_cl/data/datamodule.py), which
        Megatron passes on unchanged.
        """
        sequence, batch, heads, width = query.shape
        dropout = self.dropout if self.training else 0.0
        if parallel_state.get_context_parallel_world_size() > 1:
            out = attend_across_ranks(query, key, value, attention_mask, partial(self._attend, dropout=dropout))
        elif attention_mask is None:
            query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            out = self._attend(query, key, value, dropout).permute(2, 0, 1, 3)
        else:
            query, key, value = (
                tensor.transpose(0, 1).reshape(batch * sequence, -1, width) for tensor in (query, key, value)
            )
            if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
                packed = self._attend_by_kernel(query, key, value, attention_mask, sequence)
            else:
                packed = self._attend_by_segment(query, key, value, attention_mask, dropout)
            out = packed.view(batch, sequence, heads, width).transpose(0, 1)
        return out.reshape(sequence, batch, heads * width)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        """Attend over (batch, heads, sequence, width). With more keys than queries, the queries are the last
        positions."""
        if query.shape[2] == key.shape[2]:
            mask, is_causal = None, True
        else:
            mask, is_causal = causal_lower_right(query.shape[2], key.shape[2]), False
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.softmax_scale,
            dropout_p=dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _attend_by_segment(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        """Attend over (tokens of the batch, heads, width), one call per segment: for any device and dtype."""
        ends = sorted(set(segments.tolist()))  # without empty segments
        sizes = [stop - start for start, stop in pairwise(ends)]
        # One split and one concatenation: the gradient of each slice, or of each write to a slice, would be as large as
        # the whole tensor.
        parts = []
        for segment in zip(*(torch.split(tensor, sizes) for tensor in (query, key, value))):
            segment_query, segment_key, segment_value = (part.transpose(0, 1)[None] for part in segment)
            parts.append(self._attend(segment_query, segment_key, segment_value, dropout)[0].transpose(0, 1))
        return torch.cat(parts)

    def _attend_by_kernel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Attend within all segments with one flash kernel. ``longest`` is an upper bound: the maximum would sync the
        GPU."""
        repeats = query.shape[1] // key.shape[1]  # torch 2.11's kernel has no grouped queries
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        out = varlen_attn(
            query, key, value, segments, segments, longest, longest, scale=self.softmax_scale, window_size=(-1, 0)
        )
        assert isinstance(out, torch.Tensor)  # a tuple only if the statistics are requested
        return out

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


def layer_spec(config: GPTConfig, vp_stage: int | None = None) -> ModuleSpec:
    """Return the layers for NeMo's ``transformer_layer_spec``."""
    return transformer_engine_layer_spec(config) if HAVE_TE else segment_layer_spec(config)


def segment_layer_spec(config: GPTConfig, vp_stage: int | None = None) -> ModuleSpec:
    """Return layers whose attention stays within segments; Transformer Engine's would use them as a mask."""
    spec = local_layer_spec(config)
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    return spec
