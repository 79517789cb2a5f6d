"""The peft group: the adapter method."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Affects, setting
from qwen_cl.config.validation import require


@dataclass(kw_only=True, slots=True)
class PeftConfig:
    default_lr: float = field(metadata=setting(Affects.checkpoint))
    """Default of ``lr``."""


TARGET_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Megatron's linear layers of a block; q, k and v are fused, as are gate and up."""


@dataclass(kw_only=True, slots=True)
class LoraConfig(PeftConfig):
    rank: int = field(metadata=setting(Affects.checkpoint))
    alpha: float = field(metadata=setting(Affects.checkpoint))
    """The update is scaled by alpha / rank."""
    dropout: float = field(metadata=setting(Affects.checkpoint))
    """Dropout probability of the adapter's input."""
    target_modules: list[str] = field(metadata=setting(Affects.checkpoint))

    def __post_init__(self) -> None:
        require("peft.rank", self.rank, at_least=1)
        require("peft.alpha", self.alpha, above=0)
        require("peft.dropout", self.dropout, at_least=0, below=1)
        unknown = [name for name in self.target_modules if name not in TARGET_MODULES]
        if unknown or not self.target_modules:
            raise UserError(
                f"peft.target_modules ({self.target_modules}) must name one or more of {', '.join(TARGET_MODULES)} "
                "(Megatron fuses q, k and v into linear_qkv, gate and up into linear_fc1)"
            )


@dataclass(kw_only=True, slots=True)
class DoraConfig(LoraConfig):
    """LoRA on the direction of each weight, with its magnitude trained beside it (arXiv 2402.09353)."""
