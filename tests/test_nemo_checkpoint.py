"""NeMo 2.0 checkpoints as a source of weights, written by NeMo itself: what is read, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_cl.config.errors import UserError
from qwen_cl.config.schema import RunConfig
from qwen_cl.plan import Plan, make_plan
from qwen_cl.source.checkpoint import Checkpoint
from qwen_cl.source.distributed import DistributedWeights
from qwen_cl.source.nemo_checkpoint import check_nemo_tensors
from qwen_cl.source.nemo_tensors import open_tensors
from tests import layout_probe, nemo_writer
from tests.conftest import Launched, launch
from tests.layout_probe import run_config
from tests.models import LLAMA_3, SMALL_TOKENIZER, save_random_model
from tests.ranks import run_ranks
from tests.test_initial_loss import _examples, _loss

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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds models/NAME in Hugging Face layout, and checkpoints/NAME of the same weights, written by NeMo."""
    base = tmp_path_factory.mktemp("nemo")
    tokenizer = base / "nemo_tokenizer"  # what NeMo's importers save
    tokenizer.mkdir()
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
    return base


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(base / "checkpoints/qwen2-tied", tmp_path / "checkpoint"))


@cache
def config_of_any() -> RunConfig:
    return run_config("model=tiny", "task.sequence_length=64")


def plan_of(source: Path | str) -> Plan:
    config = config_of_any()
    return make_plan(replace(config, model=replace(config.model, source=str(source))))


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


def test_what_is_read_is_what_was_trained(base: Path) -> None:
    for name in NAMES:
        plan = plan_of(base / "checkpoints" / name)
        published = plan_of(base / "models" / name).architecture
        if name == "qwen3-untied":  # NeMo's class has the length of the published Qwen3 models
            published = replace(published, max_position_embeddings=40960)
        assert plan.architecture == published, name
        assert (plan.model.commit, plan.model.source) == (None, str(base / "checkpoints" / name))


def test_tensors_by_name_are_those_of_the_model(base: Path) -> None:
    """What an export merges an adapter into."""
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


def test_a_run_from_a_checkpoint_and_a_run_from_that_ones(base: Path, tmp_path: Path) -> None:
    """Both start at the loss transformers computes; the second reads what the first, with optimizer state, saved."""
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
    return _loss(reference, _examples(model, "validation"))


def change(checkpoint: Path, key: str, value: Any) -> None:
    path = checkpoint / "context/model.yaml"
    model = yaml.safe_load(path.read_text())
    *parents, name = key.split(".")
    (model[parents[0]] if parents else model)[name] = value
    path.write_text(yaml.safe_dump(model))


def refused(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        plan_of(source)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


NEMO = "nemo.collections.llm.gpt.model"
BY_NAME = {"pretrained_model_name": {"attr": "Qwen/Qwen2.5-0.5B"}}
CONTEXTS: list[tuple[str, Any, str]] = [
    ("config._target_", f"{NEMO}.mixtral.MixtralConfig8x7B", "supported: Qwen2, Qwen2.5, Qwen3, Llama 2 and 3, Smol"),
    ("config._target_", "os.system", "model class os.system is not supported"),
    ("config._target_", {"a": ["b"]}, "model class {'a': ['b']} is not supported"),
    ("config.num_moe_experts", 8, "num_moe_experts (8) is not supported; use a model without it"),
    ("config.rotary_percent", 0.5, "rotary_percent (0.5) is not supported; it must be 1"),
    ("config.normalization", "LayerNorm", "normalization (LayerNorm) is not supported; it must be RMSNorm"),
    ("config.qk_layernorm", True, "qk_layernorm (True) is not supported; it must be False"),
    ("config.normalization", "a\nb", "normalization (a b) is not supported"),
    ("tokenizer", {"pretrained_model_name": {"attr": "a; rm -rf"}}, "holds no files of a Hugging Face tokenizer"),
    ("config.softmax_type", "learnable", "softmax_type (learnable) is not supported"),
    ("config.activation_func", {"_target_": "torch.nn.functional.gelu"}, "is not supported; it must be silu"),
    ("config.window_size", [128, 0], "window_size ([128, 0]) is not supported in this family"),
    ("config.num_layers", "two", "num_layers (two) must be a positive integer"),
    ("config.num_layers", True, "num_layers (True) must be a positive integer"),
    ("config.rotary_base", float("inf"), "rotary_base (inf) must be a positive number"),
    ("config.num_layers", 3, "_weight has shape (2, 64) where context/model.yaml calls for (3, 64)"),
    ("config.hidden_size", 128, "where context/model.yaml calls for"),
    ("config.share_embeddings_and_output_weights", False, "lacks module.output_layer.weight, which context/model.yam"),
    ("config.vocab_size", 2000, "has shape (1600, 64) where context/model.yaml calls for (2000, 64)"),
    ("config.make_vocab_size_divisible_by", 7, "its tokenizer has 1536 tokens, which no padding makes the 1600 rows"),
    ("config", None, "config (None) must hold the fields"),
    ("tokenizer", None, "no files of a Hugging Face tokenizer (tokenizer: None); put the model's tokenizer.json and"),
    ("tokenizer", {"pretrained_model_name": "../../elsewhere"}, "holds no files of a Hugging Face tokenizer"),
    (
        "tokenizer",
        BY_NAME,
        "by its name, Qwen/Qwen2.5-0.5B, without its files; fetch them once: hf download Qwen",
    ),
]


@pytest.mark.parametrize(
    ("key", "value", "message"), CONTEXTS, ids=[f"{key}={value}"[:50] for key, value, _ in CONTEXTS]
)
def test_a_context_that_says_something_else_is_refused(key: str, value: Any, message: str, checkpoint: Path) -> None:
    shutil.copytree(checkpoint / "context/nemo_tokenizer", checkpoint.parent / "elsewhere")
    change(checkpoint, key, value)
    assert message in refused(checkpoint)


def test_a_tokenizer_put_into_the_context_is_taken(checkpoint: Path) -> None:
    change(checkpoint, "tokenizer", BY_NAME)
    (checkpoint / "context/nemo_tokenizer").rename(checkpoint / "context/tokenizer")
    assert plan_of(checkpoint).architecture.vocab_size == 1536


def test_yaml_that_names_python_is_not_built(checkpoint: Path) -> None:
    path, proof = checkpoint / "context/model.yaml", checkpoint / "proof"
    path.write_text(f"config: !!python/object/apply:os.mkdir [{proof}]\n")
    assert "cannot be read as plain YAML: could not determine a constructor" in refused(checkpoint)
    path.write_text("a: " + "[" * 10000)
    assert "cannot be read as plain YAML" in refused(checkpoint)
    path.write_text("- config")
    assert "must hold the fields of a model" in refused(checkpoint)
    path.unlink()
    assert "is missing, so nothing says what the weights are" in refused(checkpoint)
    assert not proof.exists()


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def test_metadata_that_names_code_is_not_run(checkpoint: Path) -> None:
    path, proof = checkpoint / "weights/.metadata", checkpoint / "proof"
    path.write_bytes(pickle.dumps(Evil(proof)))
    assert f"{path} is not the metadata of a checkpoint: it names posix.mkdir" in refused(checkpoint)
    for damaged in (b"", b"\x80\x04N.", b"\x80\x04]" + b"(" * 1000 + b"e."):
        path.write_bytes(damaged)
        assert f"{path} is not the metadata of a checkpoint" in refused(checkpoint)
    path.unlink()
    assert f"{path} cannot be read: no distributed checkpoint is there" in refused(checkpoint)
    assert not proof.exists()


def test_metadata_cut_or_changed_anywhere_is_refused_or_harmless(checkpoint: Path) -> None:
    """No byte of it ends in a traceback."""
    path, architecture = checkpoint / "weights/.metadata", plan_of(checkpoint).architecture
    content = path.read_bytes()
    for position in range(0, len(content), 61):
        for damaged in (content[:position], content[:position] + b"\xff" + content[position + 1 :]):
            path.write_bytes(damaged)
            try:
                check_nemo_tensors(checkpoint, architecture)
            except UserError as error:
                assert "\n" not in str(error)
                continue
            assert damaged != content[:position]


def test_metadata_that_leads_out_of_the_directory_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "weights/.metadata"
    content = path.read_bytes()
    assert content.count(b"__0_0.distcp") > 0
    path.write_bytes(content.replace(b"__0_0.distcp", b"../00.distcp"))
    (checkpoint / "00.distcp").write_bytes((checkpoint / "weights/__0_0.distcp").read_bytes())
    assert "file name '../00.distcp' leaves the directory" in refused(checkpoint)


def test_weights_that_are_not_whole_are_refused(checkpoint: Path) -> None:
    path = max((checkpoint / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"{path} is shorter than .metadata says; the checkpoint is not whole" in refused(checkpoint)
    path.unlink()
    assert f"{path} is missing; .metadata names it, so the checkpoint is not whole" in refused(checkpoint)


def test_a_flipped_bit_in_the_weights_is_found_when_they_are_read(checkpoint: Path) -> None:
    weights = DistributedWeights(checkpoint / "weights")
    key = "module.embedding.word_embeddings.weight"
    before = weights.read(key, None)
    for path in (checkpoint / "weights").glob("*.distcp"):
        content = bytearray(path.read_bytes())
        place = content.find(before[100, :16].numpy().tobytes())
        if place >= 0:
            content[place] ^= 1
            path.write_bytes(content)
    with pytest.raises(UserError, match=r"embeddings.weight cannot be read, the checkpoint is damaged: the checksum"):
        weights.read(key, None)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("weights/adapter_metadata.json", "is the checkpoint of an adapter alone; merge it into its base first"),
        ("weights/modelopt_state", "is a model quantized or pruned with ModelOpt"),
        ("modelopt_state", "is a model quantized or pruned with ModelOpt"),
    ],
)
def test_other_kinds_of_checkpoints_are_refused(file: str, message: str, checkpoint: Path) -> None:
    (checkpoint / file).touch()
    assert message in refused(checkpoint)


def test_modelopt_state_beside_safetensors_is_refused_too(base: Path, tmp_path: Path) -> None:
    """NeMo would unpickle it from there as well."""
    model = Path(shutil.copytree(base / "models/qwen2-tied", tmp_path / "model"))
    (model / "modelopt_state").mkdir()
    assert "is a model quantized or pruned with ModelOpt" in refused(model)


def test_a_directory_that_is_half_a_checkpoint_is_refused(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "context")
    assert "has weights/ and no context/" in refused(checkpoint)
    assert "name the directory above it" in refused(checkpoint / "weights")
