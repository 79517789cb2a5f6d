"""The loading of Hugging Face tensors into Megatron's shards: model shapes, mapping, slices and coverage."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file, save_file

from qwen_cl.config.errors import UserError
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.formats.safetensors import Checkpoint
from qwen_cl.models.loading.megatron_shards import CoverageError, check_coverage, fill, qkv_copies
from qwen_cl.models.loading.readers import read_into
from qwen_cl.models.reference import read_model_config
from qwen_cl.models.weight_mapping import count_parameters, expected_shapes, rule_for, split_qkv
from tests.support.models import save_random_model

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 3,
    "hidden_size": 60,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "initializer_range": 0.03,
    "tie_word_embeddings": True,
}
READ: dict[str, Any] = {
    "model_type": "qwen2",
    "num_layers": 3,
    "hidden_size": 60,
    "ffn_hidden_size": 20,
    "num_attention_heads": 6,
    "num_query_groups": 3,
    "kv_channels": 10,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 5e5,
    "init_method_std": 0.03,
    "tied_embeddings": True,
    "sliding_window": None,
    "rope_scaling": None,
    "qkv_bias": True,
    "qk_norm": False,
}
WHERE = Path("/models/qwen")


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name not in names}


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (CONFIG, {}),
        ({**CONFIG, "head_dim": 32}, {"kv_channels": 32}),
        ({**CONFIG, "head_dim": None}, {}),
        ({**CONFIG, "num_key_value_heads": None}, {"num_query_groups": 6}),
        (without("tie_word_embeddings"), {"tied_embeddings": False}),
        (without("rope_theta", "initializer_range"), {"rotary_base": 1e4, "init_method_std": 0.02}),
        ({**CONFIG, "rope_scaling": None, "hidden_act": "silu", "quantization_config": None}, {}),
        ({**CONFIG, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}, {}),
    ],
)
def test_every_field_is_read(config: dict[str, Any], changed: dict[str, Any]) -> None:
    assert asdict(read_architecture(config, WHERE)) == {**READ, **changed}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("hidden_act", "gelu"),
    ],
)
def test_what_would_change_the_result_is_refused(field: str, value: object) -> None:
    with pytest.raises(UserError) as refused:
        read_architecture({**CONFIG, field: value}, WHERE)
    assert str(refused.value) == f"{WHERE}/config.json: {field} ({value}) is not supported; use a model without it"


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe", None, ["qwen2"]])
def test_another_architecture_is_refused(family: object) -> None:
    with pytest.raises(UserError) as refused:
        read_architecture({**CONFIG, "model_type": family}, WHERE)
    assert str(refused.value) == (
        f"{WHERE}/config.json: model_type ({family}) is not supported; supported: "
        "qwen2 (Qwen2, Qwen2.5), qwen3 (Qwen3), llama (Llama 2 and 3, SmolLM2), mistral (Mistral)"
    )


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "num_attention_heads", "rms_norm_eps"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(UserError) as refused:
        read_architecture(without(field), WHERE)
    assert str(refused.value) == f"{WHERE}/config.json: {field} is missing"


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", "many"), ("hidden_size", None), ("rms_norm_eps", []), ("num_attention_heads", 0)],
)
def test_a_field_that_is_not_a_number_is_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(str(WHERE / 'config.json'))}: "):
        read_architecture({**CONFIG, field: value}, WHERE)


@pytest.mark.parametrize("tied", [True, False])
def test_the_expected_tensors_are_those_transformers_saves(tied: bool, tmp_path: Path) -> None:
    save_random_model(tmp_path, heads=2, kv_groups=1, head_width=8, layers=3, vocab_size=96, tied=tied)
    architecture = read_architecture(read_model_config(tmp_path), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert expected_shapes(architecture) == {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert ("lm_head.weight" in saved) != tied
    assert count_parameters(expected_shapes(architecture)) == sum(tensor.numel() for tensor in saved.values())


def test_a_key_nobody_knows_stops_the_run() -> None:
    architecture = Architecture(**READ)
    for key in ("decoder.layers.mlp.router.weight", "module.position_embeddings.weight", "decoder.layers.", ""):
        with pytest.raises(KeyError):
            rule_for(key, architecture)
    assert rule_for("module.decoder.layers.mlp.linear_fc1.weight", architecture) == rule_for(
        "decoder.layers.mlp.linear_fc1.weight", architecture
    )


@pytest.mark.parametrize("shape", [(), (7,)], ids=["bias", "weight"])
@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(4, 2, 8), (6, 3, 4), (5, 5, 2), (15, 5, 6), (7, 1, 16), (14, 2, 64), (1, 1, 1)]
)
def test_split_qkv_undoes_the_interleaving(
    heads: int, groups: int, width: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    architecture = Architecture(
        **{**READ, "num_attention_heads": heads, "num_query_groups": groups, "kv_channels": width}
    )
    sizes = {"q": heads, "k": groups, "v": groups}
    tensors = {name: torch.randn(count * width, *shape) for name, count in sizes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    per_group = heads // groups
    total = (heads + 2 * groups) * width

    def read(first_row: int, num_rows: int) -> torch.Tensor:
        rows = torch.full((num_rows, *shape), torch.nan)
        read_into(list(qkv_copies(rows, ("q", "k", "v"), first_row, architecture)), checkpoint)
        return rows

    fused = read(0, total)

    query, key, value = (torch.tensor_split(tensors[name], len(tensors[name]) // width) for name in "qkv")  # by head
    blocks = [
        [*query[group * per_group : (group + 1) * per_group], key[group], value[group]] for group in range(groups)
    ]
    assert torch.equal(fused, torch.cat([head for block in blocks for head in block]))
    for part, name in zip(split_qkv(fused, architecture), "qkv"):
        assert torch.equal(part, tensors[name])

    rows = total // groups
    shards = [read(group * rows, rows) for group in range(groups)]
    assert torch.equal(torch.cat(shards), fused)


def spans(parameter: torch.nn.Parameter, *rows: tuple[int, int]) -> list[tuple[int, int]]:
    width = parameter.shape[1] * parameter.element_size()
    return sorted((parameter.data_ptr() + first * width, parameter.data_ptr() + last * width) for first, last in rows)


@pytest.mark.parametrize("rows", [[(0, 8)], [(0, 3), (3, 8)], [(3, 8), (0, 1), (1, 3)]])
def test_an_exact_tiling_is_accepted(rows: list[tuple[int, int]]) -> None:
    parameter = torch.nn.Parameter(torch.empty(8, 4))
    check_coverage(spans(parameter, *rows), [("table", parameter)])


@pytest.mark.parametrize("rows", [[], [(0, 7)], [(1, 8)], [(0, 3), (4, 8)]])
def test_a_gap_is_refused(rows: list[tuple[int, int]]) -> None:
    parameter, whole = (torch.nn.Parameter(torch.empty(8, 4)) for _ in range(2))
    covered = sum(last - first for first, last in rows) * 16
    filled = sorted(spans(parameter, *rows) + spans(whole, (0, 8)))
    message = f"parameter table: {covered} of 128 bytes came from the checkpoint; the weights cannot be trusted"
    with pytest.raises(CoverageError, match=f"^{message}$"):
        check_coverage(filled, [("whole", whole), ("table", parameter)])


@pytest.mark.parametrize("rows", [[(0, 8), (0, 8)], [(0, 5), (4, 8)], [(0, 8), (2, 3)]])
def test_an_overlap_is_refused(rows: list[tuple[int, int]]) -> None:
    parameter = torch.nn.Parameter(torch.empty(8, 4))
    with pytest.raises(CoverageError, match=r"^two shards were written to the same parameter; "):
        check_coverage(spans(parameter, *rows), [("table", parameter)])


def test_fill_refuses_a_parameter_no_shard_reaches(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(60)}, tmp_path / "model.safetensors")
    reached, forgotten = (torch.nn.Parameter(torch.zeros(60)) for _ in range(2))
    key = "module.decoder.final_layernorm.weight"
    state = {key: ShardedTensor.from_rank_offsets(key, reached.data)}
    with pytest.raises(CoverageError, match=r"^parameter adapter: 0 of 240 bytes came from the checkpoint; "):
        parameters = [("norm", reached), ("adapter", forgotten)]
        fill(state, parameters, Checkpoint(tmp_path), Architecture(**READ))
    assert torch.equal(reached, torch.zeros(60))  # refused before anything was written
