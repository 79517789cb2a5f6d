"""NeMo 2.0 checkpoints, written by NeMo itself, as a source of weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_cl.config.errors import UserError
from qwen_cl.models.formats.safetensors import Checkpoint
from qwen_cl.models.formats.torch_dist import DistributedWeights
from qwen_cl.models.loading.base_tensors import open_tensors
from tests.conftest import Launched, launch
from tests.support import layout_probe
from tests.support.demo_examples import demo_examples, mean_loss
from tests.support.nemo_checkpoints import NAMES, nemo_checkpoints, plan_of
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(shared_directory: Path) -> Path:
    return nemo_checkpoints(shared_directory)


@pytest.mark.slow
@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(2, 1), (1, 2)])
def test_logits_equal_transformers_in_another_layout(
    tensor_parallel: int, pipeline_parallel: int, base: Path, tmp_path: Path
) -> None:
    checkpoints = [base / "checkpoints" / name for name in NAMES]
    done = run_ranks(layout_probe.main, tmp_path, tensor_parallel, pipeline_parallel, checkpoints, ranks=2)
    assert done.returncode == 0, done.log[-3000:]
    ids = torch.arange(120).view(2, 60) * 7 % 1400
    for name in NAMES:
        reference = AutoModelForCausalLM.from_pretrained(base / "models" / name, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = reference(ids).logits
        logits = load_file(tmp_path / f"{name}.st")["logits"]
        assert logits.shape == expected.shape, name
        assert (logits - expected).abs().max() < 1e-4, name


@pytest.mark.slow
def test_what_is_read_is_what_was_trained(base: Path) -> None:
    for name in NAMES:
        plan = plan_of(base / "checkpoints" / name)
        published = plan_of(base / "models" / name).architecture
        if name == "qwen3-untied":  # NeMo's class has the maximum length of the published Qwen3 models
            published = replace(published, max_position_embeddings=40960)
        assert plan.architecture == published, name
        assert (plan.model.commit, plan.model.source) == (None, str(base / "checkpoints" / name))


def test_tensors_by_name_are_those_of_the_model(base: Path) -> None:
    """Read the weights into which an export merges an adapter."""
    for name in NAMES:
        model, checkpoint = base / "models" / name, base / "checkpoints" / name
        named, published = open_tensors(checkpoint, plan_of(checkpoint).architecture), Checkpoint(model)
        for tensor in published.names:
            assert torch.equal(named.read(tensor, slice(None)), published.read(tensor, slice(None)).float()), tensor


def test_a_relative_reference_lies_in_nemos_cache(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_MODELS_CACHE", str(base / "checkpoints"))
    assert plan_of("nemo://qwen2-tied").model.source == str(base / "checkpoints/qwen2-tied")
    with pytest.raises(UserError, match=r"model.source \(nemo://absent\): .*absent is not a NeMo 2.0 checkpoint"):
        plan_of("nemo://absent")


@pytest.mark.slow
def test_a_run_from_a_checkpoint_and_a_run_from_that_ones(base: Path, tmp_path: Path) -> None:
    """Start at transformers' loss from a checkpoint, and from the one, with optimizer state, that this run saves."""
    settings = ["experiment=smoke", "model=local", "wandb.mode=disabled", "cluster.accelerator=cpu", "seed=7"]
    settings += ["task.max_steps=2", "task.checkpoint_interval=1", "task.keep_last=2"]
    first = launch(
        *settings,
        f"model.source=nemo://{base}/checkpoints/qwen3-untied",
        "peft=none",
        "lr=1e-3",
        *("cluster.devices=2", "cluster.tensor_parallel=2"),
        directory=tmp_path / "first",
        warm=True,
    )
    assert first.returncode == 0, first.stderr + first.folder.log.read_text()[-3000:]
    assert _initial_loss(first) == pytest.approx(_expected_loss(base / "models/qwen3-untied"), abs=1e-4)

    checkpoint = first.folder.checkpoints / "step=1"
    keys = DistributedWeights(checkpoint / "weights").keys
    assert any("optimizer" in key for key in keys), "it holds no optimizer state, so this test shows less than it says"
    said = [f"model.source='{checkpoint}'", "peft=lora"]
    second = launch(*settings, *said, directory=tmp_path / "second", warm=True)
    assert second.returncode == 0, second.stderr + second.folder.log.read_text()[-3000:]
    exported = launch("task=export", f"task.run={first.folder.directory}", "task.step=1", directory=tmp_path / "unused")
    assert exported.returncode == 0, exported.stderr
    trained = first.folder.directory / "export-merged"
    assert _initial_loss(second) == pytest.approx(_expected_loss(trained), abs=1e-4)
    assert abs(_expected_loss(trained) - _initial_loss(first)) > 1e-3, "the first run changed nothing"
    adapter = json.loads((second.folder.adapter / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(checkpoint)


def _initial_loss(run: Launched) -> float:
    records = [json.loads(line) for line in run.folder.metrics_file.read_text().splitlines()]
    return float(next(record["val/target/loss"] for record in records if record["step"] == 0))


def _expected_loss(model: Path) -> float:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return mean_loss(reference, demo_examples(model, "validation"))
