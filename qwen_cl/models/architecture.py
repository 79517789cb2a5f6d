"""The architecture that a model's config.json describes, in Megatron's terms. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.families import FAMILIES, FULL, SLIDING, Family
from qwen_cl.models.formats.tensor_files import has_own_head
from qwen_cl.models.rope import Rope, RopeScaling, read_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes and features of a model, named as in megatron.core's TransformerConfig where it has the field."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Width of one attention head."""
    vocab_size: int
    """Rows of the embedding as published, without padding."""
    max_position_embeddings: int
    sliding_window: int | None
    """Tokens that a position attends to; None for all before it."""
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: RopeScaling | None
    init_method_std: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        return self.num_query_groups * self.kv_channels

    @property
    def longest_sequence(self) -> int:
        """Return the most tokens in a sequence.

        Attention is always full and causal here, which equals the model's own up to its window.
        """
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


TIED = "tie_word_embeddings"
QUANTIZED = ("quantization_config", "compression_config")
NOT_EMPTY = ("per_layer_config", "pruned_heads", "transformers_weights")
"""Fields of transformers that describe layers of other shapes or weights in other files; they must be empty."""


def read_architecture(config: dict[str, Any], directory: Path) -> Architecture:
    """Read the fields Megatron needs from a Hugging Face config.json.

    Raises:
        UserError: The architecture or one of its features is not supported, or a field is missing.
    """
    path = directory / "config.json"
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        supported = ", ".join(f"{key} ({value.title})" for key, value in FAMILIES.items())
        raise UserError(f"{path}: model_type ({name}) is not supported; supported: {supported}")
    _check_fields(config, family, path)
    _refuse_unsupported(config, family, path)
    _check_layer_types(config, family, path)
    return _architecture(family, config, read_rope(config, family.rope_types, path), directory)


REQUIRED = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
    "max_position_embeddings",
)
OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window", "max_window_layers")
"""Fields that may be absent or null, and are positive integers otherwise."""


def _check_fields(config: dict[str, Any], family: Family, path: Path) -> None:
    required = (*REQUIRED, "rms_norm_eps", *(("num_key_value_heads",) if family.key_value_heads_required else ()))
    for name in required:
        if name not in config:
            raise UserError(f"{path}: {name} is missing")
    for name in (*REQUIRED, *(name for name in OPTIONAL if config.get(name) is not None)):
        least = 0 if name == "max_window_layers" else 1
        if type(config[name]) is not int or config[name] < least:
            raise UserError(f"{path}: {name} ({json.dumps(config[name])}) must be a positive integer")
    for name in ("rms_norm_eps", *(("initializer_range",) if "initializer_range" in config else ())):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{path}: {name} ({json.dumps(value)}) must be a positive number")


def _architecture(family: Family, config: dict[str, Any], rope: Rope, directory: Path) -> Architecture:
    heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    groups = config["num_key_value_heads"] if family.key_value_heads_required else config.get("num_key_value_heads")
    return Architecture(
        model_type=family.model_type,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden_size,
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups or heads,
        kv_channels=config.get("head_dim") or family.head_dim or hidden_size // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        sliding_window=_window(config, family),
        layernorm_epsilon=float(config["rms_norm_eps"]),
        rotary_base=rope.theta,
        rope_scaling=rope.scaling,
        init_method_std=float(config.get("initializer_range", 0.02)),
        tied_embeddings=bool(config.get(TIED)) and not has_own_head(directory),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )


def _window(config: dict[str, Any], family: Family) -> int | None:
    return None if family.sliding_window is None else family.sliding_window.width(config)


def _check_layer_types(config: dict[str, Any], family: Family, path: Path) -> None:
    """Check the list that transformers 5 writes; a family without a window has no sliding layer."""
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(
            f"{path}: layer_types ({json.dumps(kinds)}) must name a kind for each of num_hidden_layers ({layers})"
        )
    known = (FULL,) if family.sliding_window is None else (FULL, SLIDING)
    if unknown := [kind for kind in kinds if kind not in known]:
        raise UserError(
            f"{path}: layer_types has {json.dumps(unknown[0])}, which is not supported; supported: {', '.join(known)}"
        )
    if SLIDING in kinds and _window(config, family) is None:
        raise UserError(
            f"{path}: layer_types has {SLIDING}, but sliding_window or use_sliding_window disable the window; "
            "set them to what the model was trained with"
        )


def _refuse_unsupported(config: dict[str, Any], family: Family, path: Path) -> None:
    """Refuse features that would silently change the result if they were ignored."""
    for flag in (TIED, "use_sliding_window", *family.unsupported_flags):
        if not isinstance(config.get(flag), bool | None):
            raise UserError(f"{path}: {flag} ({json.dumps(config[flag])}) must be true or false")
    for field in QUANTIZED:
        if config.get(field):
            method = config[field].get("quant_method") if isinstance(config[field], dict) else config[field]
            raise UserError(
                f"{path}: {field} ({method or 'unnamed method'}) is not supported, because the weights are quantized; "
                "use the model that this one was quantized from"
            )
    unsupported = {
        "hidden_act": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_dropout": bool(config.get("attention_dropout")),
        **{field: bool(config.get(field)) for field in NOT_EMPTY},
        **{flag: bool(config.get(flag)) for flag in family.unsupported_flags},
    }
    for field, present in unsupported.items():
        if present:
            raise UserError(f"{path}: {field} ({config[field]}) is not supported; use a model without it")
