"""Parameter counts against transformers, and the memory estimate against sums done by hand."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.load import SHAPES
from qwen_cl.config.cluster import Precision
from qwen_cl.config.run import RunConfig
from qwen_cl.config.speed import When
from qwen_cl.config.store import register_schemas
from qwen_cl.models.adapter_methods import adapter_parameters
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.weight_mapping import count_parameters, expected_shapes, layer_shapes
from qwen_cl.planning.flops import training_flops
from qwen_cl.planning.memory import MemoryEstimate, batch_shape, estimate_memory

ROOT = Path(__file__).resolve().parents[2]
QWEN_05B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
UNTIED = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 200,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
# By hand, from the published config: what one layer and the whole of Qwen2.5-0.5B hold.
LAYER_05B = 896 * (896 + 2 * 128) + (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864 + 2 * 896
TOTAL_05B = 494_032_768


def architecture(fields: dict[str, Any]) -> Architecture:
    rest = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
    return read_architecture({**rest, **fields}, ROOT)


def parameters(fields: dict[str, Any]) -> int:
    return count_parameters(expected_shapes(architecture(fields)))


@functools.cache  # nothing changes what is returned
def run_config(*overrides: str) -> RunConfig:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", ["cluster.accelerator=cpu", "task.micro_batch_size=2", *overrides])
    return cast(RunConfig, OmegaConf.to_object(composed))


def estimate(
    *overrides: str, precision: Precision = Precision.bf16, fields: dict[str, Any] = QWEN_05B
) -> MemoryEstimate:
    config = run_config(*overrides)
    return estimate_memory(architecture(fields), batch_shape(config), config.peft, config.cluster, precision)


@pytest.mark.parametrize(
    "fields",
    [
        QWEN_05B,
        UNTIED,
        {**UNTIED, "tie_word_embeddings": True},
        {**UNTIED, "num_key_value_heads": 6},
        {**UNTIED, "num_key_value_heads": 1, "num_hidden_layers": 1},
    ],
    ids=["0.5b", "untied", "tied", "ungrouped", "one-group"],
)
def test_parameters_are_as_many_as_transformers_makes(fields: dict[str, Any]) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**fields))
    assert parameters(fields) == model.num_parameters()


def test_the_smallest_qwen_has_its_published_size() -> None:
    assert count_parameters(layer_shapes(0, architecture(QWEN_05B))) == LAYER_05B
    assert parameters(QWEN_05B) == TOTAL_05B
    assert parameters({**QWEN_05B, "tie_word_embeddings": False}) == TOTAL_05B + 151936 * 896


def test_adapters_count_every_tensor_of_every_target() -> None:
    shape = architecture(QWEN_05B)
    # Inputs and outputs of qkv, proj, fc1 (gate and up), fc2.
    qkv, proj, fc1, fc2 = 896 + 1152, 896 + 896, 896 + 2 * 4864, 4864 + 896
    assert adapter_parameters(run_config("peft.rank=32").peft, shape) == 24 * 32 * (qkv + proj + fc1 + fc2)
    assert estimate("peft.rank=32").trainable_parameters == 15_532_032
    of_two = ("peft.rank=8", "peft.target_modules=[linear_qkv,linear_fc2]")
    assert adapter_parameters(run_config(*of_two).peft, shape) == 24 * 8 * (qkv + fc2)
    # DoRA has a magnitude of each output besides.
    outputs = 24 * (1152 + 896 + 2 * 4864 + 896)
    assert estimate("peft=dora", "peft.rank=32").trainable_parameters == 15_532_032 + outputs == 15_836_160
    assert adapter_parameters(run_config("peft=dora", *of_two).peft, shape) == 24 * (8 * (qkv + fc2) + 1152 + 896)


def test_full_training_has_no_adapters() -> None:
    assert adapter_parameters(run_config("peft=none").peft, architecture(QWEN_05B)) is None
    assert estimate("peft=none").trainable_parameters == TOTAL_05B


def test_state_is_what_megatrons_optimizer_keeps() -> None:
    counted = TOTAL_05B - 896  # all but the final norm
    # bf16 weights; fp32 gradients, and masters and two moments divided over data parallel ranks.
    assert estimate("peft=none").weights == 2 * counted
    assert estimate("peft=none").gradients_and_optimizer == (4 + 12) * counted
    assert estimate("peft=none", "cluster.devices=2").gradients_and_optimizer == (4 + 12 // 2) * counted
    # In fp32 the weights are their own masters.
    assert estimate("peft=none", precision=Precision.fp32).weights == 4 * counted
    assert estimate("peft=none", precision=Precision.fp32).gradients_and_optimizer == (4 + 8) * counted
    assert estimate("peft.rank=32").gradients_and_optimizer == (4 + 12) * 15_532_032


@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("fields", [QWEN_05B, UNTIED], ids=["tied", "untied"])
def test_splitting_layers_takes_less_of_each_device(peft: str, fields: dict[str, Any]) -> None:
    whole = estimate(f"peft={peft}", fields=fields)
    halves = estimate(f"peft={peft}", "cluster.devices=2", "cluster.tensor_parallel=2", fields=fields)
    assert halves.weights == pytest.approx(whole.weights / 2, abs=2)
    assert halves.gradients_and_optimizer == pytest.approx(whole.gradients_and_optimizer / 2, abs=2)
    assert whole.activations / 2 < halves.activations < whole.activations
    assert halves.total < whole.total
    assert halves.trainable_parameters == whole.trainable_parameters


def test_splitting_the_stack_takes_less_weights_of_each_device() -> None:
    halves = estimate("cluster.devices=2", "cluster.pipeline_parallel=2")
    assert halves.weights == 2 * (12 * LAYER_05B + 151936 * 896)


@pytest.mark.parametrize("key", ["task.micro_batch_size", "task.sequence_length"])
def test_activations_grow_with_the_tokens_of_a_pass(key: str) -> None:
    before, after = (estimate("task.global_batch_size=8", f"{key}={size}") for size in (4, 8))
    assert after.activations == 2 * before.activations > 0
    assert (after.weights, after.gradients_and_optimizer) == (before.weights, before.gradients_and_optimizer)
    assert after.total - before.total == before.activations


def test_layers_that_are_computed_again_keep_little() -> None:
    """Check that the inputs of 24 layers and all of one layer remain, and that the logits do not change."""
    config = run_config()
    speeds = [replace(config.speed, activation_recompute=recompute) for recompute in (When.never, When.always)]
    before, after = (
        estimate_memory(architecture(QWEN_05B), batch_shape(config), config.peft, config.cluster, Precision.bf16, speed)
        for speed in speeds
    )
    logits = config.training.sequence_length * config.training.resolved_micro_batch_size * 151936 * 6
    assert (before.activations - logits) / 24 < after.activations - logits < (before.activations - logits) / 12
    assert (after.weights, after.gradients_and_optimizer) == (before.weights, before.gradients_and_optimizer)


@pytest.mark.parametrize("path", sorted((ROOT / "conf/model").glob("qwen*.yaml")), ids=lambda path: path.stem)
def test_an_adapter_costs_less_than_full_fine_tuning_at_every_size(path: Path) -> None:
    """Memory by the estimate, and what there is to compute; benchmarks/results has the speed of what fits one GPU."""
    shape = read_architecture(SHAPES[path.stem.removeprefix("qwen2.5-")], ROOT)
    cost = {}
    for peft in ("lora", "none"):
        config = run_config(f"peft={peft}")
        needed = estimate_memory(shape, batch_shape(config), config.peft, config.cluster, Precision.bf16, config.speed)
        cost[peft] = (needed.total, training_flops(shape, adapter_parameters(config.peft, shape)).per_token)
    assert cost["lora"][0] < 0.5 * cost["none"][0]
    assert cost["lora"][1] < 0.8 * cost["none"][1]


def test_the_total_is_the_sum_of_its_parts() -> None:
    parts = estimate()
    assert parts.total == parts.weights + parts.gradients_and_optimizer + parts.activations


@pytest.mark.parametrize("name", ["0.5b", "micro-batch-8"])
def test_what_a_run_took_is_somewhat_less(name: str) -> None:
    """Compare with benchmarks on an H200 with speed optimizations; an estimate far above them is of no use."""
    measured = json.loads((ROOT / f"benchmarks/results/throughput-h200-{name}.json").read_text())
    visits = [visit for visit in measured["runs"] if visit["framework"] == "qwen_cl" and "error" not in visit]
    assert visits
    for visit in visits:
        config = run_config(
            *("task=pretrain", "data=mock", "retention=none", f"task.sequence_length={measured['sequence_length']}"),
            *(
                f"task.global_batch_size={measured['global_batch_size']}",
                f"task.micro_batch_size={visit['micro_batch']}",
            ),
            *(["peft=lora", "peft.rank=32"] if visit["training"] == "lora" else ["peft=none"]),
        )
        speed = replace(config.speed, compile=When.always, fused_linear_cross_entropy=When.always)
        said = estimate_memory(
            architecture(QWEN_05B), batch_shape(config), config.peft, config.cluster, Precision.bf16, speed
        ).total
        assert 0.75 < visit["peak"] / said < 0.95, f"{visit['peak'] / said:.3f}"
