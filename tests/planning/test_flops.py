"""The operations that utilisation is counted from, against torch's own count of what transformers and PEFT do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.reference import read_model_config
from qwen_cl.planning.flops import peak_flops, training_flops
from tests.support.models import save_random_model

LENGTH = 96
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", params=[{"tied": True}, {"family": "qwen3", "tied": False, "head_width": 32}])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"), vocab_size=1537, **request.param)


def architecture_of(directory: Path) -> Architecture:
    return read_architecture(read_model_config(directory), directory)


def counted(model: Any, length: int) -> int:
    """Return the FLOPs of one sequence, forward and backward; eager attention computes the full square."""
    ids = torch.arange(length)[None] % 1400
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    return int(counter.get_total_flops())


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def test_full_fine_tuning_is_what_torch_counts(directory: Path) -> None:
    flops = training_flops(architecture_of(directory), None)
    for length in (LENGTH, 2 * LENGTH):
        # Besides, transformers multiplies the rotary frequencies with the positions.
        assert flops.of(length, length**2) == pytest.approx(counted(load(directory), length), rel=1e-3)


def test_an_adapter_is_what_torch_counts(directory: Path) -> None:
    architecture = architecture_of(directory)
    model = get_peft_model(load(directory), LoraConfig(r=8, target_modules=TARGETS))
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    flops = training_flops(architecture, adapters)
    # Nothing below the first layer is trained: its q, k, v have no gradient for their input, which is not subtracted.
    qkv = architecture.hidden_size * (architecture.query_size + 2 * architecture.key_value_size)
    adapter_inputs = 2 * 8 * architecture.hidden_size * 3
    expected = flops.of(LENGTH, LENGTH**2) - (2 * qkv + adapter_inputs) * LENGTH
    assert expected == pytest.approx(counted(model, LENGTH), rel=1e-3)
    assert flops.per_token < training_flops(architecture, None).per_token


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756.5e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_a_known_device_has_its_peak(name: str, peak: float) -> None:
    assert peak_flops(name) == peak


def test_an_unknown_device_has_none() -> None:
    assert peak_flops("NVIDIA GeForce RTX 3060") is None
