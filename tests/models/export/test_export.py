"""An export computes the same function in PEFT and transformers as the run's model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_cl.launch.local import worker_environment
from qwen_cl.planning.plan import make_plan
from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.prepare import write_worker_inputs
from tests.conftest import FEW
from tests.support import probe
from tests.support.exporting import composed, run_export
from tests.support.models import LLAMA_3, save_random_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    method: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        family = self.model.get("family", "qwen2")
        return f"{self.method}-{family}-tp{self.tensor_parallel}-pp{self.pipeline_parallel}"


CASES = [
    Case("lora", model={"dtype": torch.bfloat16}),  # with biases, which DoRA must not scale
    # In fp32, norms summed over ranks differ from norms of complete rows in the last bit.
    Case("dora", tensor_parallel=2, model={"dtype": torch.bfloat16}),
    Case("none", tensor_parallel=2, model={"vocab_size": 1537, "dtype": torch.bfloat16}),  # a row of padding
    Case("none", pipeline_parallel=2, model={"family": "mistral", "tied": False, "sliding_window": None}),
    Case(
        "lora",
        tensor_parallel=2,
        model={"family": "qwen3", "head_width": 24, "hidden_size": 64, "max_shard_size": "200KB"},
    ),
    Case("dora", model={"family": "llama", "rope_scaling": LLAMA_3, "tied": False}),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_exported_computes_what_the_run_computed(case: Case, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", **case.model)
    _add_what_is_rare(model)
    folder = tmp_path / "run"
    _train(model, case, folder)
    _check_logits(model, folder, case)
    _check_untouched(model, folder)


def _check_logits(model: Path, folder: Path, case: Case) -> None:
    probe = load_file(folder / "probe.safetensors")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    vocab_size = base.config.vocab_size
    expected = probe["logits"][..., :vocab_size]
    assert probe["logits"].shape[-1] == -(-vocab_size // case.tensor_parallel) * case.tensor_parallel
    with torch.no_grad():
        before = base(probe["ids"]).logits
    assert (before - expected).abs().max() > 0.1, "training changed nothing, so this test shows nothing"

    run_export(f"task.run={folder}", "task.dtype=fp32")
    merged = AutoModelForCausalLM.from_pretrained(folder / "export-merged", dtype="auto").eval()
    assert merged.dtype is torch.float32
    with torch.no_grad():
        assert (merged(probe["ids"]).logits - expected).abs().max() < 1e-4
    if case.method == "none":
        return
    run_export(f"task.run={folder}", "task.format=adapter")
    for file in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
    ):  # from the checkpoint, and from the live model
        assert (folder / "export-adapter" / file).read_bytes() == (folder / "adapter" / file).read_bytes(), file
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, str(folder / "export-adapter")).eval()
        assert (adapted(probe["ids"]).logits - expected).abs().max() < 1e-4


def _check_untouched(model: Path, folder: Path) -> None:
    """Export an untrained model, which must equal the base bit for bit."""
    untouched = folder / "untouched"
    run_export(f"task.run={folder}", "task.step=0", f"task.output={untouched}", "task.max_shard_size=300KB")
    before, after = (_tensors(directory) for directory in (model, untouched))
    tied = json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    assert after.keys() == before.keys() - ({"lm_head.weight"} if tied else set())
    for name, tensor in after.items():
        assert tensor.dtype is before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    index = json.loads((untouched / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert len(set(index["weight_map"].values())) > 1
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (untouched / name).read_bytes() == (model / name).read_bytes(), name


def _add_what_is_rare(model: Path) -> None:
    """Export weights that are -0.0, and a base with an lm_head that tied embeddings make redundant."""
    tied = json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    for path in sorted(model.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "q_proj" in name:
                tensor.view(-1)[:4] = -0.0
        if tied and path.name == "model.safetensors":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path, metadata={"format": "pt"})


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _train(model: Path, case: Case, folder: Path) -> None:
    overrides = [f"peft={case.method}", "experiment=smoke", "wandb.mode=disabled", "model=local", "retention=none", FEW]
    overrides += [f"model.source={model}", "cluster.accelerator=cpu"]
    overrides += [f"cluster.tensor_parallel={case.tensor_parallel}"]
    overrides += [f"cluster.pipeline_parallel={case.pipeline_parallel}"]
    processes = case.tensor_parallel * case.pipeline_parallel
    overrides += [f"cluster.devices={processes}"]
    overrides += ["model.verify=none"]  # the probe disturbs the adapters before it would be compared
    overrides += ["lr=0.01"] if case.method == "none" else ["peft.rank=8", "peft.alpha=20"]
    plan = make_plan(composed(*overrides))
    folder.mkdir()
    write_worker_inputs(plan, RunFolder(folder))
    done = run_ranks(probe.main, folder, ranks=processes, environment=worker_environment(plan.config))
    assert done.returncode == 0, done.log[-3000:]
    assert RunFolder(folder).samples.exists()
