"""Megatron's norms without Transformer Engine or apex, under sequence parallelism too."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.torch_norm import WrappedTorchNorm

from qwen_cl.patches.registry import replace

_stock_new = WrappedTorchNorm.__new__


def install() -> None:
    """Replace Megatron's wrapper of torch's norms.

    Megatron refuses torch's norms under sequence parallelism, where a rank has a part of each row: the norm of a token
    is no other there, but the gradient of the norm's weight is a part too, and must be summed. Megatron does that for
    parameters that are marked so, as apex's norms mark theirs.
    """
    replace(WrappedTorchNorm, "__new__", _of_any_rows)


def _of_any_rows(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    as_if_whole = copy.copy(config)
    as_if_whole.sequence_parallel = False
    norm = _stock_new(cls, as_if_whole, *args, **kwargs)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
