"""torch.compile of transformer layers, each as one graph.

A layer is a few dozen small operations around its matrix products. Run one by one they cost more time to start than
to compute, and each reads and writes whole activations; compiled they are a handful of kernels. All layers of a model
share one compiled graph, because they differ in their weights alone.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, utils
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from nemo.lightning.pytorch.callbacks.peft import AdapterWrapper
from torch._dynamo import config as compiler

from qwen_cl.patches.registry import replace, replace_everywhere
from qwen_cl.training.speed import fused_ops
from qwen_cl.training.speed.tensor_parallel import is_split


def compile_layers(model: torch.nn.Module) -> int:
    """Compile every layer at its next call, and return how many there are. Parameters keep their names.

    ``fullgraph`` makes an operation that cannot be compiled an error rather than a slow run. Shapes are compiled as
    they are first seen; from the second length on, lengths are symbols, so that rows of every length share a graph.
    """
    _silence_group_getter()
    fused_ops.install(model)
    compiler.disable = False
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        if is_split():
            _leave_out_products(layer)
        layer.compile(fullgraph=not is_split())
    return len(layers)


def _leave_out_products(layer: TransformerLayer) -> None:
    """Products of a part of a weight talk to other ranks while they compute, which no graph can hold: a layer is then
    a graph before, between and after them."""
    products = [module for module in layer.modules() if isinstance(module, AdapterWrapper)]
    adapted = {id(part) for wrapper in products for part in wrapper.modules() if part is not wrapper}
    products += [
        module
        for module in layer.modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and id(module) not in adapted
    ]
    for module in products:
        replace(module, "forward", torch.compiler.disable(module.forward))  # type: ignore[no-untyped-call]


def _silence_group_getter() -> None:
    """megatron/core/utils.py warns of a deprecation on each call, and a warning cannot be a part of a graph."""
    replace_everywhere(utils, "get_tensor_model_parallel_group_if_none", _group_or_default)


def _group_or_default(tp_group: Any, is_expert: bool = False, check_initialized: bool = True) -> Any:
    if tp_group is not None or not torch.distributed.is_initialized():
        return tp_group if torch.distributed.is_initialized() else None
    if is_expert:
        return parallel_state.get_expert_tensor_parallel_group(check_initialized=check_initialized)
    return parallel_state.get_tensor_model_parallel_group(check_initialized=check_initialized)
