"""Random models, saved by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from qwen_cl.models.families import FAMILIES
from tests.conftest import ROOT

DEMO_MODEL = ROOT / "qwen_cl/demo/model"
SMALL_TOKENIZER = ROOT / "tests/support/tokenizer"
"""The tokenizer of small, fast models, with 1536 ids and a config.json that names its special tokens."""
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so small that a missing scaling shows in 60 tokens
}


def special_tokens() -> dict[str, Any]:
    """Return the special token ids of the models' tokenizer, as in its config.json."""
    config = json.loads((SMALL_TOKENIZER / "config.json").read_text(encoding="utf-8"))
    return {name: config.get(name) for name in ("bos_token_id", "eos_token_id")}


def save_random_model(
    directory: Path,
    *,
    family: str = "qwen2",
    heads: int = 4,
    kv_groups: int = 2,
    head_width: int = 16,
    hidden_size: int | None = None,
    layers: int = 2,
    vocab_size: int = 1536,
    tied: bool = True,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """Save a model with random weights, biases and norms, so that a missing or misplaced one changes the loss.

    ``fields`` go into the family's config as they are.
    """
    torch.manual_seed(heads * vocab_size)
    named = FAMILIES[family].transformers
    config_class, model_class = (getattr(transformers, f"{named}{kind}") for kind in ("Config", "ForCausalLM"))
    hidden_size = hidden_size or heads * head_width
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_groups,
        head_dim=head_width,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **{"rope_theta": 1e6, **special_tokens(), **fields},
    )
    model = model_class(config)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.1)
    model.tie_weights()
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(SMALL_TOKENIZER / name, directory)
    return directory


def write_index(directory: Path) -> None:
    """Write the index of the safetensors in ``directory``."""
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as stream:
            weight_map |= dict.fromkeys(stream.keys(), path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
