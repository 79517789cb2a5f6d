"""Levers on speed that do not change what is computed, beyond rounding. See schema.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum

from qwen_cl.config.fields import Affects, setting

LOSS_CHUNK_BYTES = 3 * 2**29
"""fused_linear_cross_entropy: of the logits of one chunk, in their own type; 5,000 tokens of Qwen2.5 in bf16, whose
products fill any GPU."""


class When(str, Enum):
    auto = "auto"
    """Where it is known to work and to gain (qwen_cl/planning/speed.py)."""
    always = "always"
    """Or the run is refused."""
    never = "never"


@dataclass(kw_only=True, slots=True)
class SpeedConfig:
    compile: When = field(metadata=setting(Affects.execution))
    """Compile each transformer layer, as one graph."""
    fused_linear_cross_entropy: When = field(metadata=setting(Affects.execution))
    """Output layer and loss together, some tokens at a time."""
    fused_lora: When = field(metadata=setting(Affects.execution))
    """LoRA's products joined with those of the layer it adapts."""
    cuda_graphs: When = field(metadata=setting(Affects.execution))
    """Record the forward and backward pass of a micro batch, and replay it."""
    fused_grad_accumulation: When = field(metadata=setting(Affects.execution))
    """A layer's gradients of a micro batch added to those of the step by one compiled kernel."""
    activation_recompute: When = field(metadata=setting(Affects.nothing))
    """Keep of each layer its input alone, and compute the rest again in the backward pass: slower, in less memory."""
    rope_cache: bool = field(metadata=setting(Affects.execution))
    """Sines and cosines of positions once per pass and not once per layer, for queries and for keys."""
    fused_adam: bool = field(metadata=setting(Affects.execution))
    """Adam's step of all weights in one kernel, and not an operation at a time."""
    foreach_grad_clip: bool = field(metadata=setting(Affects.execution))
    """Norm and clipping of all gradients at once, without waiting for the GPU."""

    def taken(self) -> dict[str, bool]:
        """Whether the run has each lever, once nothing is auto."""
        return {name: value in (True, When.always) for name, value in asdict(self).items()}
