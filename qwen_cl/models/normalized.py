"""A model's config.json and tokenizer, normalized so that transformers 4.57 and 5 read them alike.

4.57 silently ignores transformers 5's ``rope_parameters``: theta becomes 10000, and Llama 3's scaling is lost.
transformers and NeMo always read a model from the normalized files; exports include the author's own files.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.files.atomic_folder import atomic_directory
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.formats.nemo_layout import tokenizer_directory
from qwen_cl.models.reference import read_model_config
from qwen_cl.models.tokenizer.files import write_object
from qwen_cl.models.tokenizer.normalized import write_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NOT_KEPT = ("auto_map", "dtype", "rope_parameters", "rope_theta", "rope_scaling", "torch_dtype")
"""Fields of config.json that differ between the versions, or that name code."""


def normalized_config(config: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return ``config`` with the fields of ``architecture`` in normalized form, and all others unchanged."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    scaling = architecture.rope_scaling
    rule, width = architecture.family.sliding_window, architecture.sliding_window
    window: dict[str, Any] = {"use_sliding_window": width is not None} if rule is not None and rule.opt_in else {}
    if rule is not None:
        window["sliding_window"] = width
    left_out = NOT_KEPT if rule is not None and rule.by_layer else (*NOT_KEPT, "layer_types")
    return {
        **{key: value for key, value in config.items() if key not in left_out},
        **window,
        "model_type": architecture.model_type,
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.kv_channels,
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "rms_norm_eps": architecture.layernorm_epsilon,
        "initializer_range": architecture.init_method_std,
        "hidden_act": "silu",
        "tie_word_embeddings": architecture.tied_embeddings,
        "rope_theta": architecture.rotary_base,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **asdict(scaling)},
        **({} if dtype is None else {"dtype": dtype}),
    }


def transformers_config(normalized: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    fields = {key: value for key, value in normalized.items() if key != "model_type"}
    return AutoConfig.for_model(normalized["model_type"], **fields)


def write_normalized_files(source: Path, target: Path) -> None:
    """Write config, generation config, tokenizer and chat templates of ``source`` to ``target``, replacing its content.

    Raises:
        UserError: The model or its tokenizer is not supported.
    """
    config = read_model_config(source)
    files = tokenizer_directory(source)
    with atomic_directory(target, replace=True) as temporary:
        write_tokenizer(files, temporary)
        write_object(temporary / "config.json", normalized_config(config, read_architecture(config, source)))
        if (files / "generation_config.json").is_file():
            shutil.copyfile(files / "generation_config.json", temporary / "generation_config.json")
