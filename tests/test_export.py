"""What a run leaves is the function it computed, by the reckoning of PEFT and transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_cl.config.store import register_schemas
from qwen_cl.plan import make_plan
from qwen_cl.run import write_worker_inputs
from qwen_cl.run_folder import RunFolder
from tests.conftest import ROOT, launch
from tests.models import LLAMA_3, save_random_model

TRAINED: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),  # with biases, which DoRA must not scale
    ("dora", {}),
    ("none", {"family": "mistral", "tied": False, "vocab_size": 1537, "sliding_window": None}),
    ("lora", {"family": "qwen3", "head_width": 24, "hidden_size": 64, "max_shard_size": "200KB"}),
    ("dora", {"family": "llama", "rope_scaling": LLAMA_3, "tied": False}),
]


@pytest.mark.parametrize(
    ("method", "shape"), TRAINED, ids=[f"{method}-{shape.get('family', 'qwen2')}" for method, shape in TRAINED]
)
def test_what_is_exported_computes_what_the_run_computed(method: str, shape: dict[str, Any], tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", **shape)
    folder = tmp_path / "run"
    _train(model, method, folder)
    probe = load_file(folder / "probe.safetensors")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(probe["ids"]).logits
    assert (before - probe["logits"]).abs().max() > 0.1, "training changed nothing, so this test shows nothing"

    assert launch("task=export", f"task.run={folder}", directory=tmp_path / "unused").returncode == 0
    merged = AutoModelForCausalLM.from_pretrained(folder / "export-merged").eval()
    with torch.no_grad():
        assert (merged(probe["ids"]).logits - probe["logits"]).abs().max() < 1e-4
    if method == "none":
        return
    exported = launch("task=export", f"task.run={folder}", "task.format=adapter", directory=tmp_path / "unused")
    assert exported.returncode == 0
    for file in sorted(path.name for path in (folder / "adapter").iterdir()):
        assert (folder / "export-adapter" / file).read_bytes() == (folder / "adapter" / file).read_bytes(), file
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
        assert (adapted(probe["ids"]).logits - probe["logits"]).abs().max() < 1e-4


def _train(model: Path, method: str, folder: Path) -> None:
    register_schemas()
    overrides = [f"peft={method}", "experiment=smoke", "wandb.mode=disabled", "model=local", f"model.source={model}"]
    overrides += ["lr=0.01"] if method == "none" else ["peft.rank=8", "peft.alpha=20"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", overrides))
    folder.mkdir()
    write_worker_inputs(make_plan(config), RunFolder(folder))  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/probe.py"), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
