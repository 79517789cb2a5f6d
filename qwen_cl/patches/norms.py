"""Make Megatron's norms work without Transformer Engine or apex, also under sequence parallelism."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.torch_norm import WrappedTorchNorm

from qwen_cl.patches.registry import replace

_stock_new = WrappedTorchNorm.__new__


def install() -> None:
    """Replace Megatron's wrapper of torch's norms, which refuses them under sequence parallelism.

    There a rank has some of the positions: the norm of a token is the same, but the gradient of the norm's weight must
    be summed over ranks. Megatron does that for parameters that are marked, as apex's norms mark theirs.
    """
    replace(WrappedTorchNorm, "__new__", _of_any_rows)


def _of_any_rows(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    as_if_whole = copy.copy(config)
    as_if_whole.sequence_parallel = False
    norm = _stock_new(cls, as_if_whole, *args, **kwargs)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
