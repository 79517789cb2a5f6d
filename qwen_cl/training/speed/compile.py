"""Compile transformer layers with torch.compile, each as one graph.

A layer has a few dozen small operations around its matmuls. Run separately, they take longer to launch than to compute,
and each reads and writes whole activations; compiled they are a handful of kernels. All layers of a model share one
compiled graph, because they differ only in their weights.
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
    """Compile every layer at its next call, and return their number. Parameters keep their names.

    ``fullgraph`` makes an operation that cannot be compiled an error rather than a slow run. The first shape is
    compiled as static; from the second length on, lengths are dynamic, so that all lengths share a graph.
    """
    _silence_group_getter()
    fused_ops.install(model)
    compiler.disable = False
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        if is_split():
            _exclude_parallel_linear(layer)
        layer.compile(fullgraph=not is_split())
    return len(layers)


def _exclude_parallel_linear(layer: TransformerLayer) -> None:
    """Exclude tensor parallel linear layers, whose communication cannot be in a graph: a layer becomes several
    graphs."""
    excluded = [module for module in layer.modules() if isinstance(module, AdapterWrapper)]
    adapted = {id(part) for wrapper in excluded for part in wrapper.modules() if part is not wrapper}
    excluded += [
        module
        for module in layer.modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and id(module) not in adapted
    ]
    for module in excluded:
        replace(module, "forward", torch.compiler.disable(module.forward))  # type: ignore[no-untyped-call]


def _silence_group_getter() -> None:
    """Replace a getter of megatron/core/utils.py that warns on each call, as a warning cannot be in a graph."""
    replace_everywhere(utils, "get_tensor_model_parallel_group_if_none", _group_or_default)


def _group_or_default(tp_group: Any, is_expert: bool = False, check_initialized: bool = True) -> Any:
    if tp_group is not None or not torch.distributed.is_initialized():
        return tp_group if torch.distributed.is_initialized() else None
    if is_expert:
        return parallel_state.get_expert_tensor_parallel_group(check_initialized=check_initialized)
    return parallel_state.get_tensor_model_parallel_group(check_initialized=check_initialized)
