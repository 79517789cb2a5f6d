"""Recompute activations: layers store only their input, and recompute the rest in the backward pass (arXiv 1604.06174).

Megatron's implementation (``recompute_granularity=full``) is reentrant checkpointing, which yields no gradients inside
a layer whose input needs none, as with LoRA on a frozen embedding; torch's non-reentrant checkpointing does.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import checkpoint

from qwen_cl.patches.registry import replace


def install(model: torch.nn.Module) -> int:
    """Recompute in every layer; return their number."""
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        replace(layer, "forward", MethodType(_forward, layer))
    return len(layers)


def _forward(self: TransformerLayer, *args: Any, **kwargs: Any) -> Any:
    stock = type(self).forward
    if not torch.is_grad_enabled():
        return stock(self, *args, **kwargs)
    return checkpoint(stock, self, *args, use_reentrant=False, **kwargs)
