"""Fields of a config.json that change what the model computes are read as in transformers, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from qwen_cl.config.errors import UserError
from qwen_cl.models.architecture import read_architecture

WHERE = Path("/models/some")
COMMON: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


def config(family: str = "qwen2", **fields: Any) -> dict[str, Any]:
    return {"model_type": family, **COMMON, **fields}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_said_is_what_transformers_has(family: str) -> None:
    said = config(family)
    ours, theirs = read_architecture(said, WHERE), AutoConfig.for_model(family, **COMMON)
    rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": getattr(theirs, "rope_theta", None)}
    assert ours.rotary_base == rope["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.init_method_std == theirs.initializer_range
    assert ours.kv_channels == (getattr(theirs, "head_dim", None) or 16)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("family", FAMILIES[:3])  # transformers 5 has no null for Mistral
def test_a_null_number_of_key_value_heads_is_every_head(family: str) -> None:
    ours = read_architecture(config(family, num_key_value_heads=None), WHERE)
    assert ours.num_query_groups == 4
    if family == "mistral" and transformers.__version__ >= "5":
        return  # it takes no null there
    theirs = AutoConfig.for_model(family, **{**COMMON, "num_key_value_heads": None})
    assert theirs.num_key_value_heads == 4


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3},
        {"rope_theta": 500000, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}, "rope_parameters": None},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0, **LLAMA3}, "partial_rotary_factor": 1},
    ],
)
def test_every_form_of_one_rope_is_one_architecture(rope: dict[str, Any]) -> None:
    architecture = read_architecture(config("llama", **rope), WHERE)
    assert architecture.rotary_base == 5e5
    assert architecture.rope_scaling is not None
    assert architecture.rope_scaling.factor == 8.0
    assert architecture.rope_scaling.original_max_position_embeddings == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "disagree"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "disagree"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5, "factor": 4.0}}, "disagree"),
        ({"rope_scaling": {**LLAMA3, "type": "default"}}, "rope_scaling.rope_type (llama3)"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_theta is missing"),
        ({"rope_parameters": {}}, "rope_parameters.rope_theta is missing"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            "rope_parameters has separate fields for full_attention",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor (0.5)",
        ),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor (0.25)"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling ("),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_parameters ("),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor (2.0)"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "rope_scaling.factor (8) must be a positive number"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}, "original_max_position_embeddings (32)"),
        ({"rope_scaling": [8]}, "rope_scaling ([8]) must be an object"),
        ({"rope_theta": "1e6"}, "rope_theta (1e6) must be a positive number"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types ("),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, 'layer_types has "linear_attention"'),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types has"),
        ({"layer_types": "full_attention"}, "layer_types ("),
        ({"attention_dropout": 0.1}, "attention_dropout (0.1)"),
        ({"attention_bias": True}, "attention_bias (True)"),
        ({"mlp_bias": True}, "mlp_bias (True)"),
        ({"attention_bias": "false"}, 'attention_bias ("false") must be true or false'),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings ("false") must be true or false'),
        ({"hidden_act": "gelu"}, "hidden_act (gelu)"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights (other.safetensors)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config (gptq)"),
        ({"hidden_size": None}, "hidden_size (null) must be a positive integer"),
        ({"num_key_value_heads": 2.0}, "num_key_value_heads (2.0) must be a positive integer"),
    ],
)
def test_what_would_change_the_function_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        read_architecture(json.loads(json.dumps(config("llama", **fields))), WHERE)
    assert str(refused.value).startswith(f"{WHERE}/config.json: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({}, None),
        ({"sliding_window": 128}, None),
        ({"use_sliding_window": True, "sliding_window": 128}, None),  # max_window_layers defaults to 28
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 3}, 128),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"use_sliding_window": True, "sliding_window": 128, "layer_types": ["full_attention"] * 4}, None),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            128,
        ),
    ],
)
def test_the_window_is_that_of_the_layers_that_have_one(
    family: str, fields: dict[str, Any], window: int | None
) -> None:
    theirs = AutoConfig.for_model(family, **{**COMMON, **fields})
    slides = "sliding_attention" in theirs.layer_types
    assert (theirs.sliding_window if slides else None) == window
    assert read_architecture(config(family, **fields), WHERE).sliding_window == window
