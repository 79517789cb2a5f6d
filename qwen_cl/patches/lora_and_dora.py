"""Fix NeMo's LoRA and DoRA without Transformer Engine and on layers with a bias."""

from __future__ import annotations

import types
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from nemo.collections.llm.gpt.model.base import HAVE_TE
from nemo.collections.llm.peft import dora, lora, utils

from qwen_cl.patches.registry import replace

_stock_weight_norm = dora.DoRALinear._get_weight_norm
_stock_init_weight_magnitude = dora.ParallelLinearDoRAAdapter.init_weight_magnitude


def install() -> None:
    if not HAVE_TE:
        # megatron-core's Transformer Engine module has mocks if Transformer Engine is missing, so NeMo considers it
        # present and uses the mocks.
        replace(lora, "te", types.SimpleNamespace(Linear=type("NoTransformerEngine", (), {})))
        replace(utils, "HAVE_TE", False)
    replace(dora.DoRALinear, "forward", _dora_forward)
    replace(dora.DoRALinear, "_get_weight_norm", _norm_of_whole_rows)
    replace(dora.ParallelLinearDoRAAdapter, "init_weight_magnitude", _init_weight_magnitude)


def _dora_forward(self: dora.DoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Scale the weight but not the bias, as in DoRA (arXiv 2402.09353, equation 5) and PEFT.

    NeMo 2.7 scales both, which differs from PEFT for the biased q, k and v of Qwen.
    """
    linear_output, bias, layernorm_output = self.base_linear_forward(x)
    added = getattr(self.to_wrap, "bias", None) if bias is None else None
    if added is not None and added.numel():
        linear_output = linear_output - added
    adapter_output = self.adapter(layernorm_output.contiguous()).reshape(linear_output.shape)
    scale = (self.adapter.get_weight_magnitude() / self._get_weight_norm()).view(1, 1, -1)
    out = scale * (linear_output + adapter_output)
    if self.adapter.dropout is not None and self.training:
        dropped = self.base_linear_forward(self.adapter.dropout(layernorm_output) - layernorm_output)[0]
        out = out + (scale - 1) * (dropped if added is None else dropped - added)
    return out if added is None else out + added, bias


def _norm_of_whole_rows(self: dora.DoRALinear) -> torch.Tensor:
    """Return the norm of whole rows of the weight.

    NeMo 2.7 takes the norm of the columns on this rank. Under tensor parallelism the layers that are split by columns
    (linear_proj, linear_fc2) then compute different functions on each rank, and a checkpoint has that of the first.
    """
    norm: torch.Tensor = _stock_weight_norm(self)  # of this rank's columns
    if not self.adapter.input_is_parallel or parallel_state.get_tensor_model_parallel_world_size() == 1:
        return norm
    squares = norm.float().square()
    torch.distributed.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
    return squares.sqrt().to(norm.dtype)


def _init_weight_magnitude(self: dora.ParallelLinearDoRAAdapter, value: torch.Tensor) -> None:
    """Set the tensor parallel attributes of the magnitudes, which NeMo 2.7 does not.

    Without them, the magnitudes of split outputs count in the gradient norm on one rank only; and under sequence
    parallelism, where a rank has a part of the outputs of linear_proj and linear_fc2, their gradients are not summed.
    """
    _stock_init_weight_magnitude(self, value)
    if self.input_is_parallel:
        self.weight_magnitude.sequence_parallel = self.config.sequence_parallel
    else:
        set_tensor_model_parallel_attributes(self.weight_magnitude, is_parallel=True, dim=0, stride=1)
