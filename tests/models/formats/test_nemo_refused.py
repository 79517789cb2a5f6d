"""Invalid NeMo 2.0 checkpoints are refused, and no code in them is run."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_cl.config.errors import UserError
from qwen_cl.models.formats.nemo_weights import check_nemo_tensors
from qwen_cl.models.formats.torch_dist import DistributedWeights
from tests.support.nemo_checkpoints import nemo_checkpoints, plan_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(shared_directory: Path) -> Path:
    return nemo_checkpoints(shared_directory)


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    """Return a copy to corrupt."""
    return Path(shutil.copytree(base / "checkpoints/qwen2-tied", tmp_path / "checkpoint"))


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
    ("config.num_layers", 3, "_weight has shape (2, 64) where context/model.yaml requires (3, 64)"),
    ("config.hidden_size", 128, "where context/model.yaml requires"),
    ("config.share_embeddings_and_output_weights", False, "lacks module.output_layer.weight, which context/model.yam"),
    ("config.vocab_size", 2000, "has shape (1600, 64) where context/model.yaml requires (2000, 64)"),
    ("config.make_vocab_size_divisible_by", 7, "its tokenizer has 1536 tokens, which do not match the 1600 rows"),
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
    assert "is missing, which describes the model" in refused(checkpoint)
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
    assert f"{path} cannot be read: there is no distributed checkpoint" in refused(checkpoint)
    assert not proof.exists()


def test_metadata_cut_or_changed_anywhere_is_refused_or_harmless(checkpoint: Path) -> None:
    """Change bytes throughout the file; none may cause a traceback."""
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
    assert f"{path} is shorter than .metadata says; the checkpoint is incomplete" in refused(checkpoint)
    path.unlink()
    assert f"{path} is missing; .metadata names it, so the checkpoint is incomplete" in refused(checkpoint)


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
    """Refuse the file in Hugging Face layout too, as NeMo would unpickle it there as well."""
    model = Path(shutil.copytree(base / "models/qwen2-tied", tmp_path / "model"))
    (model / "modelopt_state").mkdir()
    assert "is a model quantized or pruned with ModelOpt" in refused(model)


def test_a_directory_that_is_half_a_checkpoint_is_refused(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "context")
    assert "has weights/ but not context/" in refused(checkpoint)
    assert "name the directory above it" in refused(checkpoint / "weights")
