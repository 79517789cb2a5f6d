"""Models with random weights, saved by transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.conftest import ROOT

DEMO_MODEL = ROOT / "qwen_cl/demo/model"


def save_random_qwen(
    directory: Path,
    *,
    heads: int = 4,
    kv_groups: int = 2,
    head_width: int = 16,
    layers: int = 2,
    vocab_size: int = 1536,
    tied: bool = True,
    max_shard_size: str = "5GB",
) -> Path:
    """Every weight random, biases and norms too, so that one left out or misplaced shows in the loss."""
    torch.manual_seed(heads * vocab_size)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=heads * head_width,
        intermediate_size=heads * head_width * 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_groups,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rope_theta=1e6,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.1)
    model.tie_weights()
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, directory)
    return directory
