"""The conversion of a NeMo 2.0 checkpoint's model config to a Hugging Face config.json. No torch, no NeMo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.families import FAMILIES, Family
from qwen_cl.models.formats.nemo_layout import WEIGHTS, read_model_yaml, short, tokenizer_directory, tokenizer_size
from qwen_cl.models.formats.torch_dist_metadata import DistributedMetadata

EMBEDDING = "module.embedding.word_embeddings.weight"

_REQUIRED_VALUES = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1,
}
_UNSUPPORTED = (
    "num_moe_experts",
    "multi_latent_attention",
    "mtp_num_layers",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "apply_query_key_layer_scaling",
    "rotary_interleaved",
    "seq_len_interpolation_factor",
    "softmax_scale",
    "softmax_type",
    "heterogeneous_block_specs",
    "is_hybrid_model",
    "mrope_section",
    "no_rope_freq",
    "window_attn_skip_freq",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "fp8_param",
    "fp4_param",
)
"""Fields of Megatron's TransformerConfig that change what the model computes, and are not supported."""


def read_nemo_config(directory: Path) -> dict[str, Any]:
    """Return the Hugging Face config.json of the model in a NeMo checkpoint.

    Raises:
        UserError: The model class or a feature is not supported, or a field is missing or wrong.
    """
    settings, path = _read_model(directory)
    family = _family(settings)
    if family is None:
        supported = ", ".join(value.title for value in FAMILIES.values())
        name = short(settings.get("_target_"))
        raise UserError(f"{path}: model class {name} is not supported; supported: {supported}")
    _refuse_unsupported(settings, family, path)
    config = _hugging_face_config(settings, family, path)
    published = _published_config(directory, config)
    config["vocab_size"] = _vocab_size(settings, published, directory, path)
    config["max_position_embeddings"] = published.get("max_position_embeddings", config["max_position_embeddings"])
    return {**{name: published[name] for name in _COPIED if name in published}, **config}


def supported_class(directory: Path) -> bool:
    """Return whether the checkpoint's model class is supported."""
    try:
        return _family(_read_model(directory)[0]) is not None
    except UserError:
        return False


def _read_model(directory: Path) -> tuple[dict[str, Any], Path]:
    """Return the fields of the model's config, with its NeMo class as ``_target_``, and the file's path."""
    model, path = read_model_yaml(directory)
    settings = model.get("config")
    if not isinstance(settings, dict):
        raise UserError(f"{path}: config ({short(settings)}) must hold the fields of the model's config")
    return settings, path


def _family(settings: dict[str, Any]) -> Family | None:
    target = settings.get("_target_")
    return next((family for family in FAMILIES.values() if family.is_nemo_config(target)), None)


def _refuse_unsupported(settings: dict[str, Any], family: Family, path: Path) -> None:
    """Refuse features that would silently change the result if they were ignored."""
    always = {**_REQUIRED_VALUES, "add_qkv_bias": family.qkv_bias, "qk_layernorm": family.qk_norm}
    for name, value in always.items():
        if settings.get(name) != value:
            raise UserError(f"{path}: {name} ({short(settings.get(name))}) is not supported; it must be {value}")
    for name in _UNSUPPORTED:
        if settings.get(name) and (name, settings[name]) != ("softmax_type", "vanilla"):
            raise UserError(f"{path}: {name} ({short(settings[name])}) is not supported; use a model without it")
    activation = settings.get("activation_func")
    if not isinstance(activation, dict) or activation.get("_target_") != "torch.nn.functional.silu":
        raise UserError(f"{path}: activation_func ({short(activation)}) is not supported; it must be silu")
    if settings.get("window_size") is not None and not family.nemo_window:
        raise UserError(f"{path}: window_size ({short(settings['window_size'])}) is not supported in this family")


def _hugging_face_config(settings: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    fields = _Fields(settings, path)
    heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if settings.get("kv_channels") is None and hidden_size % heads:
        raise UserError(f"{path}: num_attention_heads ({heads}) must divide hidden_size ({hidden_size})")
    config: dict[str, Any] = {
        "architectures": [f"{family.transformers}ForCausalLM"],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "num_hidden_layers": fields.integer("num_layers"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("ffn_hidden_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("num_query_groups", heads),
        "head_dim": fields.integer("kv_channels", hidden_size // heads),
        "max_position_embeddings": max(
            fields.integer("seq_length"), fields.integer("max_position_embeddings", fields.integer("seq_length"))
        ),
        "rms_norm_eps": fields.number("layernorm_epsilon"),
        "rope_theta": fields.number("rotary_base"),
        "initializer_range": fields.number("init_method_std"),
        "tie_word_embeddings": bool(settings.get("share_embeddings_and_output_weights")),
    }
    if "scale_factor" in settings:  # Llama31Config and the classes made from it
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": fields.number("scale_factor"),
            "low_freq_factor": fields.number("low_freq_factor"),
            "high_freq_factor": fields.number("high_freq_factor"),
            "original_max_position_embeddings": fields.integer("old_context_len"),
        }
    if family.nemo_window:
        config["sliding_window"] = _window(settings, path)
    return config


def _window(settings: dict[str, Any], path: Path) -> int | None:
    """Return the sliding window from NeMo's [tokens behind, tokens ahead]."""
    window = settings.get("window_size")
    if window is None:
        return None
    if not (isinstance(window, list) and len(window) == 2 and type(window[0]) is int and window[0] > 0):
        raise UserError(f"{path}: window_size ({short(window)}) must be [TOKENS, 0]")
    return window[0]


class _Fields:
    def __init__(self, settings: dict[str, Any], path: Path) -> None:
        self._settings, self._path = settings, path

    def integer(self, name: str, if_null: int | None = None) -> int:
        value = self._settings.get(name)
        value = if_null if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise UserError(f"{self._path}: {name} ({short(value)}) must be a positive integer")
        return value

    def number(self, name: str) -> float:
        value = self._settings.get(name)
        if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise UserError(f"{self._path}: {name} ({short(value)}) must be a positive number")
        return float(value)


_SHAPE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
_COPIED = ("sliding_window", "use_sliding_window", "bos_token_id", "eos_token_id")


def _published_config(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json beside the tokenizer, which NeMo copies with it, if it is of this model.

    Only it has the vocabulary size before padding and the model's maximum length (NeMo's seq_length is that of its last
    training). It is empty if there is none, or if the tokenizer is from another model.
    """
    try:
        published = json.loads((tokenizer_directory(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    same = isinstance(published, dict) and all(published.get(name) == config[name] for name in _SHAPE)
    return published if same else {}


def _vocab_size(settings: dict[str, Any], published: dict[str, Any], directory: Path, path: Path) -> int:
    """Return the rows of the embedding without padding, which NeMo's vocab_size may include; it may also be null."""
    given = settings.get("vocab_size")
    size = _Fields(settings, path).integer("vocab_size") if given is not None else None
    candidate = published.get("vocab_size")
    if type(candidate) is int and candidate > 0:
        if size is None or candidate == size:
            return candidate
        if candidate < size and candidate >= tokenizer_size(directory):
            return candidate
    if size is not None:
        return size
    size = tokenizer_size(directory)
    rows = DistributedMetadata(directory / WEIGHTS).shape(EMBEDDING)[0]
    multiple = _Fields(settings, path).integer("make_vocab_size_divisible_by")
    if not any(rows == -(-size // (multiple * ranks)) * multiple * ranks for ranks in range(1, 129)):
        raise UserError(
            f"{directory}: its tokenizer has {size} tokens, which do not match the {rows} rows of its embedding with "
            "any padding; tokenizer and weights are not from the same model"
        )
    return size
