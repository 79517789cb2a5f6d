"""Directories of safetensors: their files, tensors and bytes read, and the ones refused before a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_cl.config.errors import UserError
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.formats.safetensors import Checkpoint, check_tensors
from qwen_cl.models.formats.tensor_files import INDEX, SINGLE, weight_files
from qwen_cl.models.reference import read_model_config
from tests.support.models import save_random_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("saved")
    small: dict[str, Any] = {"heads": 2, "kv_groups": 1, "head_width": 8, "vocab_size": 96}
    return {
        "sharded": save_random_model(base / "sharded", **small, tied=False, max_shard_size="8KB"),
        "tied": save_random_model(base / "tied", **small, tied=True),
        "untied": save_random_model(base / "untied", **small, tied=False),
    }


@pytest.fixture
def sharded(saved: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy to corrupt, in several files with an index."""
    return Path(shutil.copytree(saved["sharded"], tmp_path / "sharded"))


@pytest.fixture
def tied(saved: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy to corrupt, in one file, without an lm_head."""
    return Path(shutil.copytree(saved["tied"], tmp_path / "tied"))


@pytest.fixture
def untied(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["untied"], tmp_path / "untied"))


def architecture_of(directory: Path) -> Architecture:
    return read_architecture(read_model_config(directory), directory)


def change_tensors(directory: Path, *, without: tuple[str, ...] = (), add: tuple[str, ...] = ()) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in without}
    save_file({**tensors, **{name: torch.ones(2) for name in add}}, path)


def test_an_index_names_every_file(sharded: Path) -> None:
    files = weight_files(sharded)
    assert files == sorted(sharded.glob("model-*.safetensors"))
    assert len(files) > 2
    checkpoint = Checkpoint(sharded)
    assert checkpoint.names == set(json.loads((sharded / INDEX).read_text())["weight_map"])
    for file in files:
        for name, tensor in load_file(file).items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert torch.equal(checkpoint.read(name, slice(None)), tensor)
    check_tensors(sharded, architecture_of(sharded))


def test_a_file_the_index_does_not_name_is_not_read(sharded: Path) -> None:
    before = weight_files(sharded)
    save_file({"model.norm.weight": torch.ones(16)}, sharded / "consolidated.safetensors")
    assert weight_files(sharded) == before
    check_tensors(sharded, architecture_of(sharded))


def test_a_file_the_index_names_is_missing(sharded: Path) -> None:
    gone = weight_files(sharded)[1]
    gone.unlink()
    with pytest.raises(UserError) as refused:
        weight_files(sharded)
    assert str(refused.value) == f"{gone} is missing; {INDEX} names it, so the download is incomplete"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "../outside.safetensors", "inside/model.safetensors"]
)
def test_an_index_cannot_leave_its_directory(name: str, sharded: Path) -> None:
    for place in (sharded.parent / "outside.safetensors", sharded / "inside/model.safetensors"):
        place.parent.mkdir(exist_ok=True)
        save_file({"model.norm.weight": torch.ones(16)}, place)
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError) as refused:
        Checkpoint(sharded)
    assert str(refused.value) == f"{sharded / INDEX}: file name {name!r} leaves the directory"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"7", b"{}", b'{"weight_map": ["a.safetensors"]}'])
def test_a_broken_index(content: bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(content)
    with pytest.raises(UserError) as refused:
        weight_files(sharded)
    assert str(refused.value).startswith(f"{sharded / INDEX} is not a safetensors index: ")


@pytest.mark.parametrize("value", ["7", "null", '["a"]', '{"a": "b"}', '""', '"."', '".."'])
def test_an_index_whose_file_is_no_file(value: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(f'{{"weight_map": {{"model.norm.weight": {value}}}}}')
    with pytest.raises(UserError) as refused:
        weight_files(sharded)
    assert str(sharded) in str(refused.value)


@pytest.mark.parametrize(
    ("others", "found"),
    [([], ""), (["pytorch_model.bin"], " (found pytorch_model.bin)"), (["a.gguf", "b.pt"], " (found a.gguf, b.pt)")],
)
def test_no_safetensors(others: list[str], found: str, tmp_path: Path) -> None:
    for name in [*others, "config.json"]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError) as refused:
        Checkpoint(tmp_path)
    assert str(refused.value) == f"{tmp_path} holds no *.safetensors{found}; weights are read from safetensors only"


def test_a_tensor_in_two_files(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    save_file({"model.norm.weight": torch.ones(16)}, sharded / "zz.safetensors")
    index["weight_map"]["model.norm.weight"] = "zz.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError) as refused:
        check_tensors(sharded, architecture_of(sharded))
    where = sharded / "zz.safetensors"
    assert str(refused.value) == f"{where}: tensor model.norm.weight is in another file of {sharded} too"


@pytest.mark.parametrize(
    "damage", ["truncated", "header only", "garbage", "empty", "a git LFS pointer", "a broken link"]
)
def test_a_damaged_file_is_named(damage: str, sharded: Path) -> None:
    path = weight_files(sharded)[1]
    content = path.read_bytes()
    path.unlink()
    if damage == "a broken link":
        path = sharded / SINGLE
        path.symlink_to(sharded / "gone")
    else:
        corrupted = {
            "truncated": content[:-1],
            "header only": content[:100],
            "garbage": b"\xde\xad\xbe\xef" * 64,
            "empty": b"",
            "a git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        }
        path.write_bytes(corrupted[damage])
    with pytest.raises(UserError) as refused:
        Checkpoint(sharded)
    assert str(refused.value).startswith(f"{path} is not a readable safetensors file: ")


@pytest.mark.parametrize("kind", ["tied", "untied", "sharded"])
def test_what_transformers_saves_is_accepted(kind: str, saved: dict[str, Path]) -> None:
    check_tensors(saved[kind], architecture_of(saved[kind]))


def test_missing_tensors_are_named(tied: Path) -> None:
    change_tensors(tied, without=("model.norm.weight",))
    with pytest.raises(UserError) as refused:
        check_tensors(tied, architecture_of(tied))
    assert str(refused.value) == f"{tied}: its safetensors lack model.norm.weight, which config.json requires"
    change_tensors(tied, without=tuple(f"model.layers.1.self_attn.{name}_proj.bias" for name in "qkv"))
    with pytest.raises(UserError, match=r"lack .*k_proj\.bias, .*q_proj\.bias, .*v_proj\.bias and 1 more, which"):
        check_tensors(tied, architecture_of(tied))


def test_a_model_without_tied_embeddings_needs_its_output_layer(untied: Path) -> None:
    change_tensors(untied, without=("lm_head.weight",))
    with pytest.raises(UserError, match=r"lack lm_head\.weight, which config\.json requires"):
        check_tensors(untied, architecture_of(untied))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.bias"])
def test_a_tensor_nothing_uses_is_refused(name: str, tied: Path) -> None:
    change_tensors(tied, add=(name,))
    with pytest.raises(UserError) as refused:
        check_tensors(tied, architecture_of(tied))
    assert str(refused.value) == f"{tied}: its safetensors hold {name}, which no layer of this model uses"


def test_tensors_that_are_shared_or_derived_are_tolerated(tied: Path) -> None:
    change_tensors(tied, add=("model.layers.0.self_attn.rotary_emb.inv_freq",))
    path = tied / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    check_tensors(tied, architecture_of(tied))


@pytest.mark.parametrize(
    ("field", "value", "tensor"),
    [
        ("intermediate_size", 16, "model.layers.0.mlp.gate_proj.weight"),
        ("vocab_size", 64, "model.embed_tokens.weight"),
        ("vocab_size", 97, "model.embed_tokens.weight"),
        ("head_dim", 4, "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_weights_of_another_shape_than_the_config_are_refused(field: str, value: int, tensor: str, tied: Path) -> None:
    """Refuse a tensor that is too large, as reading a slice of it would succeed later."""
    config = read_model_config(tied)
    (tied / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UserError) as refused:
        check_tensors(tied, architecture_of(tied))
    assert str(refused.value).startswith(f"{tied}: ")
    assert tensor in str(refused.value)
    assert "config.json" in str(refused.value)


def test_quantized_weights_are_refused(tied: Path) -> None:
    """Refuse quantized tensors, which are meaningless without scales and would be cast silently."""
    path, name = tied / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path)
    with pytest.raises(UserError) as refused:
        check_tensors(tied, architecture_of(tied))
    assert str(refused.value) == (
        f"{tied}: tensor {name} is I8; weights must be BF16, F16, F32, F64: use the model that this one was "
        "quantized from"
    )


def test_only_the_slice_read_is_counted(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(6, 4)
    save_file({"single": tensor, "half": tensor.to(torch.bfloat16)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.shape("single") == (6, 4)
    assert checkpoint.bytes_read == 0
    assert torch.equal(checkpoint.read("single", slice(2, 4)), tensor[2:4])
    assert checkpoint.bytes_read == 2 * 4 * 4
    assert torch.equal(checkpoint.read("half", slice(0, 6), slice(1, 2)), tensor[:, 1:2].to(torch.bfloat16))
    assert checkpoint.bytes_read == 2 * 4 * 4 + 6 * 2
