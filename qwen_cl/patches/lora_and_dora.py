"""Makes NeMo's LoRA and DoRA right without Transformer Engine and on layers with a bias."""

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
        # megatron-core's Transformer Engine module fills itself with mocks when the real one is missing, so NeMo
        # takes it for present and looks into the mocks.
        replace(lora, "te", types.SimpleNamespace(Linear=type("NoTransformerEngine", (), {})))
        replace(utils, "HAVE_TE", False)
    replace(dora.DoRALinear, "forward", _dora_forward)
    replace(dora.DoRALinear, "_get_weight_norm", _norm_of_whole_rows)
    replace(dora.ParallelLinearDoRAAdapter, "init_weight_magnitude", _init_weight_magnitude)


def _dora_forward(self: dora.DoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """DoRA scales the weight, not the bias (arXiv 2402.09353, equation 5); NeMo 2.7 scales both, which for
    Qwen's q, k and v is another function than the one PEFT computes from the same adapter."""
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
    """NeMo 2.7 takes the norm of the columns this rank holds. Under tensor parallelism the two layers that are split
    that way (linear_proj, linear_fc2) then train another function on each rank, and a checkpoint keeps the first's."""
    norm: torch.Tensor = _stock_weight_norm(self)  # of the columns held here
    if not self.adapter.input_is_parallel or parallel_state.get_tensor_model_parallel_world_size() == 1:
        return norm
    squares = norm.float().square()
    torch.distributed.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
    return squares.sqrt().to(norm.dtype)


def _init_weight_magnitude(self: dora.ParallelLinearDoRAAdapter, value: torch.Tensor) -> None:
    """NeMo 2.7 does not say how magnitudes are spread. Those of split outputs then count in the gradient's norm on one
    rank alone, and under sequence parallelism, where a rank sees a part of what linear_proj and linear_fc2 put out,
    nobody sums the parts of the others' gradients."""
    _stock_init_weight_magnitude(self, value)
    if self.input_is_parallel:
        self.weight_magnitude.sequence_parallel = self.config.sequence_parallel
    else:
        set_tensor_model_parallel_attributes(self.weight_magnitude, is_parallel=True, dim=0, stride=1)
