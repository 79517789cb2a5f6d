"""The comparison of a NeMo model config with a checkpoint, before any parameter is allocated. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.architecture import Architecture

COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "layernorm_zero_centered_gamma": False,
}
"""The config values common to all supported families, which a recipe for another family may not have."""
ROPE_SCALING = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}
"""The fields of config.json by field of NeMo's Llama31Config."""


def check_model_config(model_config: Any, architecture: Architecture, source: str, *, prefix: str) -> None:
    """Compare ``model_config``, a GPTConfig or its ``run.Config`` (unset fields have the class's defaults), with a
    checkpoint's architecture.

    Raises:
        UserError: A field differs from the checkpoint's model.
    """
    for field, value, wanted in _fields(model_config, architecture):
        if value != wanted:
            raise UserError(
                f"{prefix}.{field} ({value}) is not that of {source} ({wanted}); use the recipe of that model, "
                f"or set {prefix}.{field}={wanted}"
            )
    rows = model_config.vocab_size
    if rows is not None and rows < architecture.vocab_size:
        raise UserError(
            f"{prefix}.vocab_size ({rows}) is less than that of {source} ({architecture.vocab_size}); "
            f"set {prefix}.vocab_size={architecture.vocab_size}, or more for padding"
        )
    if model_config.share_embeddings_and_output_weights and not architecture.tied_embeddings:
        raise UserError(
            f"{prefix}.share_embeddings_and_output_weights (True) would lose the lm_head of {source}; set it to False"
        )


def _fields(model_config: Any, architecture: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Yield each field with the recipe's value and the checkpoint's."""
    heads, hidden_size = model_config.num_attention_heads, model_config.hidden_size
    derived = {
        "num_query_groups": heads,
        "kv_channels": hidden_size // heads if hidden_size and heads else None,
        "ffn_hidden_size": 4 * hidden_size if hidden_size else None,
    }  # megatron.core's TransformerConfig, __post_init__
    for field in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
        "layernorm_epsilon",
        "rotary_base",
    ):
        value = getattr(model_config, field)
        yield field, derived.get(field) if value is None else value, getattr(architecture, field)
    yield "add_qkv_bias", model_config.add_qkv_bias, architecture.qkv_bias
    yield "qk_layernorm", model_config.qk_layernorm, architecture.qk_norm
    for field, wanted in COMMON.items():
        yield field, getattr(model_config, field), wanted
    for field, name in ROPE_SCALING.items():
        scaling = architecture.rope_scaling
        yield field, getattr(model_config, field, None), getattr(scaling, name) if scaling else None
