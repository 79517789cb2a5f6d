"""The speed group: optimizations that change the result only by rounding."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum

from qwen_cl.config.fields import Affects, setting

LOSS_CHUNK_BYTES = 3 * 2**29
"""Bytes of the logits of one chunk of fused_linear_cross_entropy: 5,000 tokens of Qwen2.5 in bf16, enough to saturate a
GPU."""


class When(str, Enum):
    """The use of a speed optimization."""

    auto = "auto"
    """Use it if it is known to work and to be faster (qwen_cl/planning/speed.py)."""
    always = "always"
    """Use it, or refuse the run."""
    never = "never"


@dataclass(kw_only=True, slots=True)
class SpeedConfig:
    compile: When = field(metadata=setting(Affects.execution))
    """Compile each transformer layer, as one graph."""
    fused_linear_cross_entropy: When = field(metadata=setting(Affects.execution))
    """Compute output layer and loss together, in chunks of tokens."""
    fused_lora: When = field(metadata=setting(Affects.execution))
    """Fuse the matmuls of LoRA with those of the adapted layer."""
    cuda_graphs: When = field(metadata=setting(Affects.execution))
    """Capture forward and backward of a micro batch as CUDA graphs, and replay them."""
    fused_grad_accumulation: When = field(metadata=setting(Affects.execution))
    """Add the gradients of a micro batch to those of the step in one compiled kernel per layer."""
    activation_recompute: When = field(metadata=setting(Affects.nothing))
    """Save only the input of each layer, and recompute the rest in the backward pass: slower, with less memory."""
    rope_cache: bool = field(metadata=setting(Affects.execution))
    """Compute the rotary embedding's sines and cosines once per micro batch, not once per layer."""
    fused_adam: bool = field(metadata=setting(Affects.execution))
    """Use one fused kernel for the Adam step of all weights."""
    foreach_grad_clip: bool = field(metadata=setting(Affects.execution))
    """Compute norm and clipping of all gradients at once, without synchronizing with the GPU."""

    def enabled(self) -> dict[str, bool]:
        """Return for each optimization if it is enabled, once nothing is auto."""
        return {name: value in (True, When.always) for name, value in asdict(self).items()}
