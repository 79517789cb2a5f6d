"""What a model's own config.json says of its shape, in Megatron's terms. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's rescaling of low rotary frequencies (transformers/modeling_rope_utils.py, "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Field names follow megatron.core's TransformerConfig where it has the field."""

    family: str
    """config.json's model_type."""
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
    """Tokens a position looks back on; None for all of them."""
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: RopeScaling | None
    init_method_std: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        return self.num_query_groups * self.kv_channels

    @property
    def longest_sequence(self) -> int:
        """Attention is full and causal here, which is the model's own up to its window."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a model_type stands for beyond the fields all decoders share."""

    title: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Where config.json has none; else hidden_size / num_attention_heads."""
    window: Callable[[dict[str, Any]], int | None] = lambda config: None
    rope_types: tuple[str, ...] = ("default",)
    unbuilt_flags: tuple[str, ...] = ()
    """Fields that must be false: the layers they add are not built."""


FAMILIES = {
    "qwen2": Family(
        title="Qwen2, Qwen2.5",
        qkv_bias=True,
        window=lambda config: config.get("sliding_window") if config.get("use_sliding_window") else None,
    ),
    "qwen3": Family(
        title="Qwen3",
        qk_norm=True,
        head_dim=128,
        window=lambda config: config.get("sliding_window") if config.get("use_sliding_window") else None,
        unbuilt_flags=("attention_bias",),
    ),
    "llama": Family(
        title="Llama 2 and 3, SmolLM2",
        rope_types=("default", "llama3"),
        unbuilt_flags=("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(title="Mistral", window=lambda config: config.get("sliding_window", 4096)),
}


def read_architecture(config: dict[str, Any], directory: Path) -> Architecture:
    """Read the fields Megatron needs from a Hugging Face config.json.

    Raises:
        UserError: another architecture, a feature this one is not built with, or a missing field.
    """
    path = directory / "config.json"
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        supported = ", ".join(f"{key} ({value.title})" for key, value in FAMILIES.items())
        raise UserError(f"{path}: model_type ({name}) is not supported; supported: {supported}")
    _refuse_unbuilt(config, family, path)
    try:
        return _architecture(str(name), family, config)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a field has the wrong type or value: {error}") from error


def _architecture(name: str, family: Family, config: dict[str, Any]) -> Architecture:
    heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
    rope = _rope(config)
    window = family.window(config)
    return Architecture(
        family=name,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden_size,
        ffn_hidden_size=int(config["intermediate_size"]),
        num_attention_heads=heads,
        num_query_groups=int(config.get("num_key_value_heads") or heads),
        kv_channels=int(config.get("head_dim") or family.head_dim or hidden_size // heads),
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        sliding_window=None if window is None else int(window),
        layernorm_epsilon=float(config["rms_norm_eps"]),
        rotary_base=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_llama3_scaling(rope) if _rope_type(rope) == "llama3" else None,
        init_method_std=float(config.get("initializer_range", 0.02)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes ``rope_parameters``; before, ``rope_theta`` stood beside ``rope_scaling``."""
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    return {**theta, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _llama3_scaling(rope: dict[str, Any]) -> RopeScaling:
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _refuse_unbuilt(config: dict[str, Any], family: Family, path: Path) -> None:
    """Features that would change the result silently if they were ignored."""
    rope = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    try:
        rope_type = _rope_type(_rope(config))
    except TypeError as error:
        raise UserError(f"{path}: {rope} ({config.get(rope)}) must be an object") from error
    unbuilt = {
        rope: rope_type not in family.rope_types,
        "partial_rotary_factor": config.get("partial_rotary_factor", 1) != 1,
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config") is not None,
        **{flag: bool(config.get(flag)) for flag in family.unbuilt_flags},
    }
    for field, present in unbuilt.items():
        if present:
            raise UserError(f"{path}: {field} ({config[field]}) is not supported; use a model without it")
