"""What a model's own config.json says of its shape, in Megatron's terms. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError

SUPPORTED = {"qwen2": "Qwen2 and Qwen2.5"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Field names follow megatron.core's TransformerConfig where it has the field."""

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
    layernorm_epsilon: float
    rotary_base: float
    init_method_std: float
    tied_embeddings: bool

    @property
    def num_parameters(self) -> int:
        return self.num_layers * self.layer_parameters + self.embedding_parameters + self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def layer_parameters(self) -> int:
        query = self.num_attention_heads * self.kv_channels
        qkv = query + 2 * self.num_query_groups * self.kv_channels
        attention = qkv * (self.hidden_size + 1) + query * self.hidden_size
        return attention + 3 * self.ffn_hidden_size * self.hidden_size + 2 * self.hidden_size


def read_architecture(config: dict[str, Any], directory: Path) -> Architecture:
    """Read the fields Megatron needs from a Hugging Face config.json.

    Raises:
        UserError: another architecture, a feature this one is not built with, or a missing field.
    """
    path = directory / "config.json"
    family = config.get("model_type")
    if family not in SUPPORTED:
        supported = ", ".join(f"{name} ({title})" for name, title in SUPPORTED.items())
        raise UserError(f"{path}: model_type ({family}) is not supported; supported: {supported}")
    _refuse_unbuilt(config, path)
    try:
        heads = int(config["num_attention_heads"])
        return Architecture(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            ffn_hidden_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_query_groups=int(config.get("num_key_value_heads") or heads),
            kv_channels=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            layernorm_epsilon=float(config["rms_norm_eps"]),
            rotary_base=float(config.get("rope_theta", 10000.0)),
            init_method_std=float(config.get("initializer_range", 0.02)),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a field has the wrong type: {error}") from error


def _refuse_unbuilt(config: dict[str, Any], path: Path) -> None:
    """Features that would change the result silently if they were ignored."""
    unbuilt = {
        "rope_scaling": config.get("rope_scaling") is not None,
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config") is not None,
    }
    for field, present in unbuilt.items():
        if present:
            raise UserError(f"{path}: {field} ({config[field]}) is not supported; use a model without it")
