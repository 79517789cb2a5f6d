"""Checkpoints of a few small models, written by NeMo itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from qwen_cl.config.run import RunConfig
from qwen_cl.planning.plan import Plan, make_plan
from tests.support import nemo_writer
from tests.support.layout_probe import run_config
from tests.support.models import LLAMA_3, SMALL_TOKENIZER, save_random_model
from tests.support.ranks import run_ranks

Saved = tuple[dict[str, Any], str, dict[str, Any]]
SAVED_AT: dict[tuple[int, int], dict[str, Saved]] = {
    (2, 1): {
        # The vocabulary is left to the tokenizer and padded to 1600 rows, as in NeMo's own recipes.
        "qwen2-tied": ({}, "Qwen2Config", {"vocab_size": None, "make_vocab_size_divisible_by": 100}),
        "llama-3-tied": (
            {"family": "llama", "rope_scaling": LLAMA_3, "rope_theta": 5e5, "dtype": torch.bfloat16},
            "Llama32Config1B",
            {"scale_factor": 8.0, "old_context_len": 32, "vocab_size": 1536, "apply_rope_fusion": False},
        ),
    },
    (1, 2): {
        # An odd number of rows, which two ranks hold only with padding.
        "qwen3-untied": (
            {"family": "qwen3", "head_width": 32, "hidden_size": 48, "tied": False, "vocab_size": 1537},
            "Qwen3Config",
            {"vocab_size": 1537},
        ),
        "mistral": (
            {"family": "mistral", "tied": False, "sliding_window": 256, "head_width": 24},
            "MistralConfig7B",
            {"window_size": [256, 0], "vocab_size": None, "make_vocab_size_divisible_by": 128},
        ),
    },
}
NAMES = [name for models in SAVED_AT.values() for name in models]


def nemo_checkpoints(shared: Path) -> Path:
    """Return a folder with models/NAME in Hugging Face layout and checkpoints/NAME with the same weights, made once."""
    base = shared / "nemo"
    with FileLock(f"{base}.lock"):
        if not base.exists():
            _write(base)
    return base


def _write(base: Path) -> None:
    tokenizer = base / "nemo_tokenizer"  # what NeMo's importers save
    tokenizer.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(SMALL_TOKENIZER / name, tokenizer)
    specification = [
        {
            "model": str(save_random_model(base / "models" / name, **shape)),
            "tokenizer": str(tokenizer),
            "config": config,
            "fields": fields,
            "to": str(base / "checkpoints" / name),
            "layout": layout,
            "layers_apart": name == "mistral",
        }
        for layout, models in SAVED_AT.items()
        for name, (shape, config, fields) in models.items()
    ]
    path = base / "specification.json"
    path.write_text(json.dumps(specification))
    written = run_ranks(nemo_writer.main, path, ranks=2)
    assert written.returncode == 0, written.log[-3000:]


@cache
def config_of_any() -> RunConfig:
    return run_config("model=tiny", "task.sequence_length=64")


def plan_of(source: Path | str) -> Plan:
    config = config_of_any()
    return make_plan(replace(config, model=replace(config.model, source=str(source))))
