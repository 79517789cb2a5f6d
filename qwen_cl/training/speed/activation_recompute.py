"""Layers that keep their input alone, and compute the rest once more when the backward pass comes to them
(arXiv 1604.06174).

Megatron's own (``recompute_granularity=full``) is of the kind that gives no gradient to what is inside where the input
needs none, as with LoRA on a frozen embedding; torch's other kind does.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import checkpoint

from qwen_cl.patches.registry import replace


def install(model: torch.nn.Module) -> int:
    """In every layer; returns how many."""
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        replace(layer, "forward", MethodType(_forward, layer))
    return len(layers)


def _forward(self: TransformerLayer, *args: Any, **kwargs: Any) -> Any:
    stock = type(self).forward
    if not torch.is_grad_enabled():
        return stock(self, *args, **kwargs)
    return checkpoint(stock, self, *args, use_reentrant=False, **kwargs)
