"""All families compute the same in Megatron and transformers, in every layout, and read only a rank's bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_cl.models.families import FAMILIES
from tests.support import family_probe, layout_probe
from tests.support.models import LLAMA_3, save_random_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "qwen2-tied": {"family": "qwen2", "heads": 6, "vocab_size": 1537},
    "qwen2-untied-sharded": {"family": "qwen2", "heads": 8, "tied": False, "max_shard_size": "100KB"},
    "qwen3-tied-sharded": {"family": "qwen3", "hidden_size": 40, "max_shard_size": "100KB"},
    "qwen3-untied": {"family": "qwen3", "head_width": 32, "hidden_size": 48, "tied": False},
    "llama-2": {"family": "llama", "kv_groups": 4, "tied": False, "rope_theta": 1e4, "vocab_size": 1541},
    "llama-3-tied": {"family": "llama", "rope_scaling": LLAMA_3, "rope_theta": 5e5},
    "mistral": {"family": "mistral", "tied": False, "sliding_window": None, "head_width": 24},
    "mistral-bf16": {"family": "mistral", "sliding_window": 256, "dtype": torch.bfloat16, "tied": False},
    "llama-untied-sharded": {"family": "llama", "tied": False, "max_shard_size": "100KB", "vocab_size": 1543},
    "mistral-tied-sharded": {"family": "mistral", "sliding_window": 128, "max_shard_size": "100KB"},
    "qwen2-bf16-tied": {"family": "qwen2", "dtype": torch.bfloat16},
    "qwen3-bf16": {"family": "qwen3", "dtype": torch.bfloat16, "tied": False, "max_shard_size": "100KB"},
    "llama-3-bf16": {"family": "llama", "rope_scaling": LLAMA_3, "dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {name: save_random_model(base / name, **shape) for name, shape in MODELS.items()}


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_logits_equal_transformers(
    tensor_parallel: int, pipeline_parallel: int, models: dict[str, Path], tmp_path: Path
) -> None:
    ranks = tensor_parallel * pipeline_parallel
    arguments = (tmp_path, tensor_parallel, pipeline_parallel, list(models.values()))
    done = run_ranks(layout_probe.main, *arguments, ranks=ranks)
    assert done.returncode == 0, done.log[-3000:]
    for name, directory in models.items():
        _check_logits(name, directory, tmp_path)
        _check_bytes(name, directory, tmp_path, ranks)


def test_a_family_of_the_same_tensors_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "ministral", family_probe.MINISTRAL)
    kinds = ["sliding_attention", "full_attention"]
    model = save_random_model(tmp_path / "ministral", family="ministral", sliding_window=64, layer_types=kinds)
    done = run_ranks(family_probe.main, tmp_path, 2, 1, [model], ranks=2)
    assert done.returncode == 0, done.log[-3000:]
    _check_logits("ministral", model, tmp_path)


def _check_logits(name: str, directory: Path, out: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.arange(120).view(2, 60) * 7 % 1400).logits
    logits = load_file(out / f"{name}.st")["logits"]
    assert logits.shape == expected.shape, name
    assert (logits - expected).abs().max() < 1e-4, name


def _check_bytes(name: str, directory: Path, out: Path, ranks: int) -> None:
    """Check that a rank reads exactly the bytes it holds; padding rows of the vocabulary are not in the file."""
    width = 2 if MODELS[name].get("dtype") is torch.bfloat16 else 4
    padding_rows = MODELS[name].get("vocab_size", 1536) % 2
    for rank in range(ranks):
        record = json.loads((out / f"{name}.{rank}.json").read_text())
        missing = record["parameters_held"] * width - record["bytes_read"]
        hidden_size = json.loads((directory / "config.json").read_text())["hidden_size"]
        assert 0 <= missing <= 2 * padding_rows * hidden_size * width, (name, rank, record)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert sum(json.loads((out / f"{name}.{rank}.json").read_text())["bytes_read"] for rank in range(ranks)) > size / 2
