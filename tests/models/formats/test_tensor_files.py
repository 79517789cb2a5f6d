"""The choice of a directory's model files, the names of its tensors, and whether its output layer is tied.

The reference is what transformers loads from the same directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from qwen_cl.config.errors import UserError
from qwen_cl.data.examples import Example
from qwen_cl.inference.model import load_model
from qwen_cl.inference.target_model import find_pretrained_model
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.config_files import copy_small_files
from qwen_cl.models.formats.safetensors import Checkpoint, check_tensors
from qwen_cl.models.formats.tensor_files import INDEX, SINGLE, weight_files
from qwen_cl.models.reference import read_model_config, resolve
from qwen_cl.training.callbacks.verify import transformers_loss
from tests.support.adapters import save_random_adapter
from tests.support.exporting import composed
from tests.support.models import save_random_model, write_index

SMALL: dict[str, Any] = {"heads": 2, "kv_groups": 1, "head_width": 8}
IDS = torch.arange(24).view(1, 24) * 7 % 90


def architecture_of(directory: Path) -> Architecture:
    return read_architecture(read_model_config(directory), directory)


def logits_here(directory: Path) -> torch.Tensor:
    """Return the logits of the model that ``task=evaluate`` and ``task=generate`` load."""
    config = composed("model=local", f"model.source={directory}", "cluster.accelerator=cpu", "cluster.precision=fp32")
    with torch.no_grad():
        return load_model(find_pretrained_model(config.model, config.data), config.cluster)(IDS).logits


def logits_of_transformers(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(IDS).logits


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal_of(directory: Path) -> str:
    with pytest.raises(UserError) as refused:
        check_tensors(directory, architecture_of(directory))
    return str(refused.value)


@pytest.mark.parametrize("stale", ["index", "single"])
def test_the_single_file_wins_over_an_index(stale: str, tmp_path: Path) -> None:
    directory = save_random_model(tmp_path / "model", **SMALL)
    tensors = load_file(directory / SINGLE)
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, directory / "model-00001-of-00001.safetensors")
    (directory / SINGLE).rename(tmp_path / SINGLE)
    write_index(directory)
    (tmp_path / SINGLE).rename(directory / SINGLE)
    if stale == "single":  # then there is none, and the index is the model
        (directory / SINGLE).unlink()
    expected = SINGLE if stale == "index" else "model-00001-of-00001.safetensors"
    assert [path.name for path in weight_files(directory)] == [expected]
    assert torch.allclose(logits_here(directory), logits_of_transformers(directory), atol=1e-5)


@pytest.mark.parametrize(
    "beside", ["consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "extra.safetensors"]
)
def test_other_safetensors_beside_the_model_are_no_part_of_it(beside: str, tmp_path: Path) -> None:
    directory = save_random_model(tmp_path / "model", **SMALL)
    save_file({"model.norm.weight": torch.ones(16), "base_model.x": torch.ones(2)}, directory / beside)
    (directory / "pytorch_model.bin.index.json").write_text("{}")
    assert [path.name for path in weight_files(directory)] == [SINGLE]
    check_tensors(directory, architecture_of(directory))
    assert torch.allclose(logits_here(directory), logits_of_transformers(directory), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "model.fp16.safetensors", "model-00001-of-00002.safetensors"]
)
def test_a_name_that_transformers_does_not_read_is_refused(name: str, tmp_path: Path) -> None:
    directory = save_random_model(tmp_path / "model", **SMALL)
    (directory / SINGLE).rename(directory / name)
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(UserError, match=rf"holds neither {SINGLE} nor {INDEX} \(found {name}\)"):
        Checkpoint(directory)


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_an_adapter_beside_the_model_is_not_verified_with_it(max_shard_size: str, tmp_path: Path) -> None:
    """Refuse a directory with adapter_config.json, which transformers reads as an adapter on its base."""
    directory = save_random_model(tmp_path / "model", **SMALL, max_shard_size=max_shard_size)
    examples = [Example(list(range(30, 60)), ((1, 30),))]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        right = float(model(torch.tensor([examples[0].ids]), labels=torch.tensor([examples[0].ids])).loss)
    save_random_adapter(directory, directory)
    assert (directory / "adapter_config.json").is_file()
    assert transformers_loss(str(directory), None, examples) == pytest.approx(right, abs=1e-6)
    assert abs(transformers_loss(str(directory), str(directory), examples) - right) > 1e-3


def test_an_index_that_says_another_file_is_refused(tmp_path: Path) -> None:
    directory = save_random_model(tmp_path / "model", **SMALL, max_shard_size="8KB")
    index = json.loads((directory / INDEX).read_text())
    right = index["weight_map"]["model.norm.weight"]
    wrong = next(file for file in index["weight_map"].values() if file != right)
    index["weight_map"]["model.norm.weight"] = wrong
    (directory / INDEX).write_text(json.dumps(index))
    assert f"{INDEX} says that model.norm.weight is in {wrong}, and it is in {right};" in refusal_of(directory)


def test_an_index_that_names_what_its_file_lacks_is_refused(tmp_path: Path) -> None:
    directory = save_random_model(tmp_path / "model", **SMALL, max_shard_size="8KB")
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"]["model.norm.weight"]
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "model.norm.weight"}, file)
    assert f"{INDEX} says that model.norm.weight is in {file.name}, which lacks it;" in refusal_of(directory)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_saved_without_its_output_layer_is_read(sharded: bool, tmp_path: Path) -> None:
    whole = save_random_model(tmp_path / "whole", **SMALL)
    directory = tmp_path / "bare"
    AutoModel.from_pretrained(whole).save_pretrained(directory, max_shard_size="8KB" if sharded else "5GB")
    for path in whole.iterdir():
        if not path.name.startswith("model") and not (directory / path.name).exists():
            (directory / path.name).write_bytes(path.read_bytes())
    names = {name for path in weight_files(directory) for name in load_file(path)}
    assert "embed_tokens.weight" in names
    check_tensors(directory, architecture_of(directory))
    logits = logits_here(directory)
    assert torch.equal(logits, logits_here(whole))
    assert torch.allclose(logits, logits_of_transformers(directory), atol=1e-5)


def test_without_an_output_layer_a_model_that_is_not_tied_is_refused(tmp_path: Path) -> None:
    whole = save_random_model(tmp_path / "whole", **SMALL, tied=False)
    directory = tmp_path / "bare"
    AutoModel.from_pretrained(whole).save_pretrained(directory)
    message = refusal_of(directory)
    assert "lack lm_head.weight, which config.json requires: tie_word_embeddings is not true" in message
    assert "AutoModelForCausalLM" in message


def test_a_tied_flag_beside_the_same_head_is_tied(tmp_path: Path) -> None:
    directory = save_random_model(tmp_path / "model", **SMALL)
    tensors = load_file(directory / SINGLE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, directory / SINGLE)
    assert architecture_of(directory).tied_embeddings
    check_tensors(directory, architecture_of(directory))


@pytest.mark.parametrize("place", [0, -1])
def test_a_tied_flag_beside_another_head_is_not_tied(place: int, tmp_path: Path) -> None:
    """Detect one different value, at either end."""
    directory = save_random_model(tmp_path / "model", **SMALL)
    tensors = load_file(directory / SINGLE)
    head = tensors["model.embed_tokens.weight"].clone()
    head.view(-1)[place] += 1
    save_file({**tensors, "lm_head.weight": head}, directory / SINGLE)
    assert not architecture_of(directory).tied_embeddings
    check_tensors(directory, architecture_of(directory))
    change_config(directory, tie_word_embeddings=False)  # then every version of transformers reads the head
    right = logits_of_transformers(directory)
    change_config(directory, tie_word_embeddings=True)
    assert torch.allclose(logits_here(directory), right, atol=1e-5)


def test_a_run_keeps_that_its_head_is_its_own(tmp_path: Path) -> None:
    """Keep the flag in the run's config, which evaluation and export read without the weights."""
    directory = save_random_model(tmp_path / "model", **SMALL)
    copy_small_files(directory, tmp_path / "tied")
    assert (tmp_path / "tied/config.json").read_bytes() == (directory / "config.json").read_bytes()
    save_file({**load_file(directory / SINGLE), "lm_head.weight": torch.ones(1536, 16)}, directory / SINGLE)
    copy_small_files(directory, tmp_path / "untied")
    assert not architecture_of(tmp_path / "untied").tied_embeddings
    assert read_model_config(tmp_path / "untied") == {**read_model_config(directory), "tie_word_embeddings": False}


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    directory = save_random_model(tmp_path / "model", **SMALL)
    tensors = load_file(directory / SINGLE)
    save_file({**tensors, "lm_head.weight": torch.ones(7, 16)}, directory / SINGLE)
    assert "tensor lm_head.weight has shape (7, 16)" in refusal_of(directory)


@pytest.mark.parametrize("suffix", ["qweight", "weight_scale_inv", "absmax"])
def test_quantized_tensors_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    directory = save_random_model(tmp_path / "model", **SMALL)
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    save_file({**load_file(directory / SINGLE), name: torch.ones(2, dtype=torch.int32)}, directory / SINGLE)
    message = refusal_of(directory)
    assert message.startswith(f"{directory}: its safetensors hold {name}, so they are quantized")
    assert "use the model that this one was quantized from" in message


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError) as refused:
        resolve(str(tmp_path))
    assert str(refused.value) == (
        f"model.source ({tmp_path}) is an adapter (adapter_config.json) and not a model; give its base, and the "
        "adapter beside it: model.source=BASE model.adapter=DIRECTORY"
    )


@pytest.mark.parametrize("as_file", [False, True])
def test_gguf_is_named(as_file: bool, tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError) as refused:
        resolve(str(tmp_path / "model.Q4_K_M.gguf" if as_file else tmp_path))
    assert "GGUF is a format for inference" in str(refused.value)
    assert "use the safetensors of the model it was made from" in str(refused.value)
