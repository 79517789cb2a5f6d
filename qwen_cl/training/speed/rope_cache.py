"""Compute sines and cosines of rotary positions once per micro batch.

megatron/core/models/common/embeddings/rope_utils.py computes them from the angles in every layer, for queries and again
for keys, in fp32.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import attention

from qwen_cl.patches.registry import replace


def install(model: torch.nn.Module) -> int:
    """Cache them for every plain rotary embedding of the model; return their number."""
    found = 0
    for module in model.modules():
        if isinstance(module, GPTModel) and _is_plain(module):
            embedding = module.rotary_pos_emb
            replace(embedding, "forward", MethodType(_tables(embedding.forward), embedding))
            found += 1
    if found:
        replace(attention, "apply_rotary_pos_emb", _apply)
    return found


def _is_plain(model: GPTModel) -> bool:
    config = model.config
    return (
        model.position_embedding_type == "rope"
        and not config.rotary_interleaved
        and not config.apply_rope_fusion
        and not config.multi_latent_attention
        and model.rotary_percent == 1.0
    )


def _tables(stock: Any) -> Any:
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return cosines, then sines, in fp32, shape (2, positions, 1, 1, width)."""
        angles = stock(*args, **kwargs)
        return torch.stack((angles.cos(), angles.sin()))

    return forward


def _apply(t: torch.Tensor, freqs: torch.Tensor, config: Any, cu_seqlens: Any = None, **options: Any) -> torch.Tensor:
    """Rotate t, of shape (positions, batch, heads, width), by freqs of :func:`_tables`, or by the angles of another
    model."""
    if freqs.dim() != 5:
        turned: torch.Tensor = apply_rotary_pos_emb(t, freqs, config, cu_seqlens, **options)
        return turned
    cos, sin = freqs.to(t.dtype).unbind(0)
    half = t.shape[-1] // 2
    return t * cos + torch.cat((-t[..., half:], t[..., :half]), dim=-1) * sin
