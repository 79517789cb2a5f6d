"""The adapter we save is the function the run computed, by PEFT's own reckoning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_cl.config.file import save_config
from qwen_cl.config.store import register_schemas
from qwen_cl.plan import make_plan
from tests.conftest import ROOT
from tests.models import save_random_model


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_computes_what_the_run_computed(method: str, tmp_path: Path) -> None:
    register_schemas()
    model = save_random_model(tmp_path / "model")  # with biases, which DoRA must not scale
    overrides = [f"peft={method}", "experiment=smoke", "peft.rank=8", "peft.alpha=20", "wandb.mode=disabled"]
    overrides += ["model=local", f"model.source={model}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", overrides))
    save_config(make_plan(config).config, tmp_path / "config.yaml")  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/probe.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    probe = load_file(tmp_path / "probe.safetensors")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(probe["ids"]).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        after = adapted(probe["ids"]).logits
    assert (before - probe["logits"]).abs().max() > 0.1, "the adapter changes nothing, so this test shows nothing"
    assert (after - probe["logits"]).abs().max() < 1e-4
