"""A base with a ``model.adapter`` merged in equals PEFT's merge everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_cl.config.errors import UserError
from qwen_cl.config.saved import read_run_config
from qwen_cl.data.mixing import Mixture
from qwen_cl.data.packing import pack_examples
from qwen_cl.models.architecture import read_architecture
from qwen_cl.models.loading.base_adapter import find_adapter, read_adapter
from qwen_cl.models.loading.base_tensors import open_tensors
from qwen_cl.models.reference import read_model_config
from tests.conftest import Launched, launch
from tests.support.adapters import adapted_by_peft, save_random_adapter
from tests.support.demo_examples import SEQUENCE_LENGTH, demo_examples, mean_loss
from tests.support.exporting import run_export
from tests.support.models import save_random_model

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.gate_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "every-linear": {"target_modules": "all-linear"},
    "one-layer": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    "fan-in-fan-out": {"fan_in_fan_out": True},  # PEFT ignores it for linear layers
}
LAYOUTS = {
    "tp1": [],
    "tp2": ["cluster.devices=2", "cluster.tensor_parallel=2"],
    "pp2": ["cluster.devices=2", "cluster.pipeline_parallel=2"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(
        tmp_path_factory.mktemp("base") / "base", heads=6, vocab_size=1537, tied=False, max_shard_size="200KB"
    )


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base, rank=3)


@pytest.fixture
def corrupted(adapter: Path, tmp_path: Path) -> Path:
    """Return a copy to change."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_tensors_are_those_of_peft(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(tmp_path / "adapter", base, **KINDS[kind])
    expected = adapted_by_peft(base, adapter).merge_and_unload().state_dict()
    architecture = read_architecture(read_model_config(base), base)
    tensors = open_tensors(base, architecture, find_adapter(str(adapter), base, architecture))
    plain = open_tensors(base, architecture)
    changed = 0
    for name, tensor in expected.items():
        found = tensors.read(name, slice(None))
        assert torch.allclose(found, tensor, atol=1e-6), name
        changed += not torch.equal(found, plain.read(name, slice(None)))
        if tensor.dim() == 2:
            assert torch.allclose(tensors.read(name, slice(3, 9), slice(5, 8)), tensor[3:9, 5:8], atol=1e-6), name
    assert changed == len(read_adapter(adapter).factors) > 0


def run_of(base: Path, adapter: Path, directory: Path, *said: str) -> Launched:
    done = launch(
        *("experiment=smoke", "model=local", f"model.source={base}", f"model.adapter={adapter}", "seed=7"),
        *("wandb.mode=disabled", "task.max_steps=2", f"task.sequence_length={SEQUENCE_LENGTH}"),
        *("model.verify=logits", "task.sample_prompts=0", "cluster.accelerator=cpu", *said),
        directory=directory,
        warm=True,
    )
    assert done.returncode == 0, done.stderr + done.folder.log.read_text()[-3000:]
    return done


def losses_of(done: Launched) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in done.folder.metrics_file.read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], {}).update(record)
    return found


@pytest.fixture(scope="module")
def runs(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launched]:
    directory = tmp_path_factory.mktemp("runs")
    return {layout: run_of(base, adapter, directory / layout, *said) for layout, said in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_begins_at_the_loss_of_peft(layout: str, runs: dict[str, Launched], base: Path, adapter: Path) -> None:
    reference = adapted_by_peft(base, adapter)
    train = Mixture([pack_examples(demo_examples(base, "train"), SEQUENCE_LENGTH)], [1.0], num_samples=4, seed=7)
    validation = demo_examples(base, "validation")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    expected = mean_loss(reference, validation)
    assert abs(expected - mean_loss(plain, validation)) > 0.01, "the adapter changes nothing: nothing is tested"
    found, verified = losses_of(runs[layout]), runs[layout].folder.status().verified
    assert found[0]["val/target/loss"] == pytest.approx(expected, abs=1e-4)
    assert found[1]["train/loss"] == pytest.approx(mean_loss(reference, [train[index] for index in range(4)]), abs=1e-4)
    assert verified["loss"] == pytest.approx(verified["transformers"], abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_run_leaves_is_base_and_both_adapters(
    layout: str, runs: dict[str, Launched], base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Compare the merged export in transformers with the one adapter in PEFT, from the run folder and exported."""
    folder = runs[layout].folder
    run_export(f"task.run={folder.directory}", f"task.output={tmp_path / 'merged'}", "task.dtype=fp32")
    run_export(f"task.run={folder.directory}", f"task.output={tmp_path / 'adapter'}", "task.format=adapter")
    validation = demo_examples(base, "validation")
    trained = losses_of(runs[layout])[2]["val/target/loss"]
    before = losses_of(runs[layout])[0]["val/target/loss"]
    assert abs(trained - before) > 1e-3, "training changed nothing, so this test shows nothing"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert mean_loss(merged, validation) == pytest.approx(trained, abs=1e-4)
    for directory in (tmp_path / "adapter", folder.adapter):
        assert mean_loss(adapted_by_peft(base, directory), validation) == pytest.approx(trained, abs=1e-4)
    card = (tmp_path / "merged/README.md").read_text()
    assert f"| earlier adapter, sha256 | {read_adapter(adapter).sha256} |" in card
    record = json.loads((folder.checkpoints / "step=2/weights/base_model.json").read_text())
    assert record["adapter"] == folder.status().model_adapter_sha256 == read_adapter(adapter).sha256


def test_a_third_stage_takes_the_adapter_of_the_second(runs: dict[str, Launched], base: Path, tmp_path: Path) -> None:
    third = run_of(base, runs["tp1"].folder.adapter, tmp_path / "run")
    before = losses_of(runs["tp1"])[2]["val/target/loss"]
    assert losses_of(third)[0]["val/target/loss"] == pytest.approx(before, abs=1e-4)


def test_what_asks_the_model_asks_the_merged_one(runs: dict[str, Launched], base: Path, adapter: Path) -> None:
    """Evaluate ``task.sets`` with an untrained model and with a run's."""
    rows = "qwen_cl/demo/data/instructions.validation.jsonl"
    as_it_is = ["model=local", f"model.source={base}", f"model.adapter={adapter}"]
    for number, said in enumerate(([f"task.run={runs['tp1'].folder.directory}"], as_it_is)):
        output = runs["tp1"].folder.directory / f"evaluated-{number}.json"
        done = launch(
            *("task=evaluate", f"task.sets={{japanese: {rows}}}", f"task.output={output}", "cluster.accelerator=cpu"),
            *(f"task.sequence_length={SEQUENCE_LENGTH}", *said),
            directory=output.with_suffix(".run"),
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(output.read_text())
        expected = losses_of(runs["tp1"])[0 if number else 2]["val/target/loss"]
        assert found["sets"]["japanese"]["loss"] == pytest.approx(expected, abs=1e-4)
        assert found["adapter"] == str(adapter)


@pytest.mark.parametrize("task", ["task=inspect", "dry_run=true"])
def test_what_only_looks_names_it(task: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    done = launch(task, "model=local", f"model.source={base}", f"model.adapter={adapter}", directory=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "merged adapter" in line)
    assert f"{adapter} (rank 3, on down_proj, gate_proj, o_proj, q_proj, v_proj" in line


@pytest.mark.parametrize("change", ["none", "another", "changed"])
def test_another_adapter_cannot_be_resumed_with(
    change: str, runs: dict[str, Launched], base: Path, corrupted: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(runs["tp1"].folder.directory, tmp_path / "run"))
    then = read_run_config(folder / "config.yaml").model.adapter
    assert then is not None
    said = {"none": "null", "another": str(corrupted), "changed": then}[change]
    weights, config = Path(then) / "adapter_model.safetensors", Path(then) / "adapter_config.json"
    before = weights.read_bytes()
    try:
        if change == "changed":
            save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
        done = launch(
            *("experiment=smoke", "model=local", f"model.source={base}", f"model.adapter={said}", "seed=7"),
            *("wandb.mode=disabled", "task.max_steps=3", f"task.sequence_length={SEQUENCE_LENGTH}"),
            *("model.verify=logits", "task.sample_prompts=0", "cluster.accelerator=cpu"),
            f"resume.allow_changes=[task.max_steps{'' if change == 'none' else ',model.adapter'}]",
            directory=folder,
        )
        assert done.returncode == 2, done.stderr
        assert "model.adapter" in done.stderr
        assert "its checkpoints are incompatible" in done.stderr
        if change == "changed":
            with pytest.raises(UserError, match="has changed since the run, and its weights no longer match"):
                run_export(f"task.run={folder}", f"task.output={tmp_path / 'export'}", "task.format=adapter")
    finally:
        weights.write_bytes(before)
    assert config.exists()


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type (LOHA) is not supported"),
        ({"use_dora": True}, "use_dora (true) is not supported"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save (["lm_head"]) is not supported'),
        ({"trainable_token_indices": [1]}, "trainable_token_indices ([1]) is not supported"),
        ({"bias": "all"}, "bias (all) is not supported"),
        ({"lora_bias": True}, "lora_bias (true) is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights (pissa) changed the base's weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication ([[0, 2]]) is not supported"),
        ({"a_field_of_tomorrow": {"x": 1}}, 'a_field_of_tomorrow ({"x": 1}) is not supported'),
        ({"r": 5}, "are not of rank 5"),
        ({"r": None}, "r (null) must be a positive number"),
        ({"lora_alpha": "16"}, 'lora_alpha ("16") must be a positive number'),
        ({"rank_pattern": {"[": 2}}, "rank_pattern ([) is not a regular expression"),
        ({"target_modules": ["k_proj"]}, "which target_modules in adapter_config.json does not name"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_field(fields: dict[str, Any], message: str, corrupted: Path) -> None:
    change_config(corrupted, **fields)
    with pytest.raises(UserError) as refused:
        read_adapter(corrupted)
    assert message in str(refused.value)
    assert str(corrupted) in str(refused.value)
    assert "\n" not in str(refused.value)


def refusal_of(adapter: Path, base: Path) -> str:
    with pytest.raises(UserError) as refused:
        find_adapter(str(adapter), base, read_architecture(read_model_config(base), base))
    return str(refused.value)


def test_an_adapter_of_another_model_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    wider = save_random_model(tmp_path / "wider", heads=8, tied=False)
    assert "it was trained on another model" in refusal_of(adapter, wider)
    fewer = save_random_model(tmp_path / "fewer", heads=6, vocab_size=1537, layers=1, tied=False)
    assert "changes model.layers.1." in refusal_of(adapter, fewer)
    tied = save_random_model(tmp_path / "tied", heads=6, vocab_size=1537)
    head = save_random_adapter(tmp_path / "head", base, target_modules=["lm_head"])
    assert "changes lm_head, which this base shares with its embedding" in refusal_of(head, tied)


def test_other_tensors_and_other_vocabularies_are_refused(base: Path, corrupted: Path) -> None:
    (corrupted / "tokenizer.json").write_text(
        (base / "tokenizer.json").read_text().replace('"added_tokens":', '"added_tokens": [], "unused":', 1)
    )
    assert "has a tokenizer whose vocabulary, merges or added tokens differ" in refusal_of(corrupted, base)
    weights = corrupted / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**load_file(weights), name: torch.ones(1537, 96)}, weights)
    assert f"holds {name}, which is not a LoRA tensor of a linear layer" in refusal_of(corrupted, base)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("hf://org/adapter@main", "hf download org/adapter --local-dir DIRECTORY"),
        ("absent", "is not a directory"),
        ("{base}", "is a model, not an adapter; write model.source="),
        ("{parent}", "is a folder with an adapter in it; write model.adapter="),
        ("{pickled}", "has no adapter_model.safetensors (found adapter_model.bin, which is pickled)"),
    ],
)
def test_what_is_no_adapter_is_refused(said: str, message: str, base: Path, corrupted: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text("{}")
    (pickled / "adapter_model.bin").write_bytes(b"")
    done = launch(
        *("model=local", f"model.source={base}", "dry_run=true"),
        f"model.adapter={said.format(base=base, parent=corrupted.parent, pickled=pickled)}",
        directory=tmp_path / "run",
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_dora_on_a_merged_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = launch(
        *("model=local", f"model.source={base}", f"model.adapter={adapter}", "peft=dora", "dry_run=true"),
        directory=tmp_path / "run",
    )
    assert done.returncode == 2
    assert "peft=dora with model.adapter is not supported" in done.stderr
