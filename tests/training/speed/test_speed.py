"""The levers of the group ``speed``: the same losses, gradients and checkpoints with and without."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen_cl.planning.speed as planned_speed
import qwen_cl.training.dry_run as preview
from qwen_cl.config.cluster import Accelerator, Precision
from qwen_cl.config.errors import UserError
from qwen_cl.config.run import RunConfig
from qwen_cl.config.speed import SpeedConfig, When
from qwen_cl.config.task.training import FinetuneConfig
from qwen_cl.training.model.loss import IGNORE_INDEX
from tests.conftest import FEW, ROOT, Launched, launch, launch_once
from tests.support.exporting import composed

ON_CPU = [f"speed.{lever}=always" for lever in ("fused_linear_cross_entropy", "fused_lora", "fused_grad_accumulation")]
RUN = ["task.max_steps=6", "task.warmup_steps=1", "task.val_check_interval=3", "task.checkpoint_interval=3", FEW]
RUN += ["task.sample_prompts=0", "wandb.mode=disabled"]
UNALIKE = ("time", "throughput/tokens_per_second", "memory/peak_gib")


@pytest.fixture(scope="module")
def plain(shared_directory: Path) -> Launched:
    return launch_once(shared_directory, "speed-plain", "speed=off", *RUN, warm=True)


def records(run: Launched) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.folder.metrics_file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in UNALIKE} for line in lines]


def assert_alike(run: Launched, other: Launched, tolerance: float = 3e-6) -> None:
    assert run.returncode == other.returncode == 0, run.stderr + other.stderr
    for one, two in zip(records(run), records(other), strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert math.isclose(value, two[key], rel_tol=tolerance), (one["step"], key, value, two[key])


def test_every_optimization_gives_the_losses_and_gradients_of_none(plain: Launched, tmp_path: Path) -> None:
    fast = launch(*ON_CPU, "speed.activation_recompute=always", *RUN, directory=tmp_path / "run", warm=True)
    assert_alike(plain, fast)
    assert plain.folder.status().speed_optimizations == {}
    assert fast.folder.status().speed_optimizations == {
        "rope_cache": 1,
        "fused_lora": 16,
        "fused_linear_cross_entropy": 1,
        "activation_recompute": 4,
        "fused_grad_accumulation": 32,
        "foreach_grad_clip": 2,
        "fused_adam": 1,
    }


def test_a_run_resumes_with_other_optimizations_than_it_began_with(plain: Launched, tmp_path: Path) -> None:
    """Adam's state too: a fused one counts its steps beside the weights, any other on the CPU."""
    directory = tmp_path / "run"
    for steps, speed in ((3, ["speed=off"]), (6, ["speed=fast", *ON_CPU])):
        arguments = [*RUN, *speed, f"task.max_steps={steps}", "task.lr_schedule=constant", "task.warmup_steps=0"]
        arguments += ["resume.allow_changes=[task.max_steps]"]
        done = launch(*arguments, directory=directory, warm=True)
        assert done.returncode == 0, done.stdout + done.stderr
    whole = launch(
        *RUN, "speed=off", "task.lr_schedule=constant", "task.warmup_steps=0", directory=tmp_path / "whole", warm=True
    )
    ends = [next(line for line in reversed(records(run)) if "train/loss" in line) for run in (done, whole)]
    assert ends[0]["step"] == ends[1]["step"] == 6
    assert math.isclose(ends[0]["train/loss"], ends[1]["train/loss"], rel_tol=3e-6)


@pytest.mark.slow
def test_compiled_layers_train_the_same(tmp_path: Path) -> None:
    arguments = [*RUN, "task.max_steps=3", "task.packing=false", "retention=none"]
    plain = launch(*arguments, "speed=off", directory=tmp_path / "plain", warm=True)
    compiled = launch(*arguments, *ON_CPU, "speed.compile=always", directory=tmp_path / "compiled", warm=True)
    assert_alike(plain, compiled)
    assert compiled.folder.status().speed_optimizations["compile"] == 4
    split = ["cluster.devices=2", "cluster.tensor_parallel=2"]
    log_of_compiler = {"TORCH_LOGS": "recompiles"}
    parts = launch(
        *arguments,
        *(*ON_CPU, *split, "speed.compile=always"),
        directory=tmp_path / "parts",
        environment=log_of_compiler,
    )
    assert_alike(plain, parts, tolerance=1e-5)
    assert parts.folder.status().speed_optimizations == compiled.folder.status().speed_optimizations
    again = re.findall(r"- \d+/\d+: (.*)", parts.folder.log.read_text(encoding="utf-8"))
    assert again
    assert all("size mismatch" in reason or "requires_grad" in reason for reason in again), again


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [2**30, 4 * 50 * 7], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_losses_by_chunks_are_torchs_own(chunk_bytes: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_cl.training.speed import fused_linear_cross_entropy

    monkeypatch.setattr(fused_linear_cross_entropy, "LOSS_CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (33,)).masked_fill(torch.rand(33) < 0.3, IGNORE_INDEX)
    hidden, weight = torch.randn(33, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    ours = fused_linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, compiled)
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum() / 3, (hidden, weight)), torch.autograd.grad(theirs.sum() / 3, (hidden, weight))
    )


@pytest.mark.parametrize("rank", [8, 5], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (24, 24)], ids=["narrows", "widens", "square"])
def test_joined_products_are_those_of_two_layers(rank: int, shape: tuple[int, int]) -> None:
    from qwen_cl.training.speed.fused_lora import fused_matmuls

    torch.manual_seed(0)
    x, down, up = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True)
        for size in ((10, shape[1]), (rank, shape[1]), (shape[0], rank))
    )
    weight, bias = torch.randn(*shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    for added in (bias, None):
        ours = fused_matmuls(x, weight, added, down, up, 0.5)
        theirs = torch.nn.functional.linear(x, weight, added) + 0.5 * (x @ down.t()) @ up.t()
        torch.testing.assert_close(ours, theirs)
        weights = torch.randn_like(ours)
        for one, two in zip(*(torch.autograd.grad((out * weights).sum(), (x, down, up)) for out in (ours, theirs))):
            torch.testing.assert_close(one, two)


def test_gradients_of_a_layer_are_added_once_though_some_never_come() -> None:
    from qwen_cl.training.speed.fused_grad_accumulation import GradientGroup, add_gradients

    weights: list[Any] = [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(3)]
    for weight in weights:
        weight.main_grad, weight.zero_out_wgrad = torch.zeros(2), True
    GradientGroup(weights, add_gradients)
    for used, totals in (((0, 2), [1, 0, 4]), ((2, 1, 0), [2, 2, 8])):
        sum(weights[number].sum() * 2**number for number in used).backward()
        assert [weight.main_grad[0].item() for weight in weights] == totals
    assert [weight.grad_added_to_main_grad and not weight.zero_out_wgrad for weight in weights] == [True] * 3


@pytest.mark.parametrize("width", [4, 640], ids=["narrow", "in parts"])
def test_swiglu_in_a_form_for_the_compiler_is_megatrons(width: int) -> None:
    from qwen_cl.training.speed.fused_ops import concatenate_in_parts, swiglu

    torch.manual_seed(0)
    both = torch.randn(3, 2, 2 * width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, width, dtype=torch.float64)
    gate, value = both.chunk(2, dim=-1)
    ours, theirs = swiglu(both, None), torch.nn.functional.silu(gate) * value
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), both)[0] for out in (ours, theirs))
    torch.testing.assert_close(ours, theirs)
    halves = ours.chunk(2, dim=-1)
    assert torch.equal(concatenate_in_parts(*halves), ours)


def settled(config: RunConfig, kind: Accelerator, **keys: Any) -> SpeedConfig:
    return planned_speed.resolve_speed(replace(config, speed=replace(config.speed, **keys)), kind)


def taken(config: RunConfig, kind: Accelerator = Accelerator.gpu) -> set[str]:
    speed = settled(config, kind)
    return {name for name in planned_speed.RESOLVED if getattr(speed, name) is When.always}


def test_auto_enables_the_optimizations_that_device_and_layout_allow(default_config: RunConfig) -> None:
    assert taken(default_config) == set(planned_speed.RESOLVED)
    packed = replace(default_config, speed=settled(default_config, Accelerator.gpu))
    assert planned_speed.has_static_shapes(packed)
    task = default_config.task
    assert isinstance(task, FinetuneConfig)
    assert "including padding" in preview.padding_note(packed)
    unpacked = replace(packed, task=replace(task, packing=False))
    assert not planned_speed.has_static_shapes(unpacked)
    assert "padded to its longest" in preview.padding_note(unpacked)
    in_fp32 = replace(default_config, cluster=replace(default_config.cluster, precision=Precision.fp32))
    assert taken(in_fp32) == set(planned_speed.RESOLVED) - {"compile", "cuda_graphs"}
    assert not planned_speed.has_static_shapes(replace(in_fp32, speed=settled(in_fp32, Accelerator.gpu)))
    assert taken(default_config, Accelerator.cpu) == {"fused_lora"}
    for layout, missing in {
        "data": set(),
        "pipeline": {"cuda_graphs"},
        "context": {"cuda_graphs", "compile"},
        "tensor": set(planned_speed.RESOLVED),
    }.items():
        said = [] if layout == "data" else [f"cluster.{layout}_parallel=2"]
        assert taken(composed("cluster.devices=2", *said)) == set(planned_speed.RESOLVED) - missing, layout


@pytest.mark.slow
def test_auto_takes_what_the_packages_that_are_there_are_known_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(*overrides: str) -> set[str]:
        return taken(composed("cluster.accelerator=gpu", *overrides))

    without_compiler = {"fused_lora", "cuda_graphs"}
    not_ours = {"fused_linear_cross_entropy", "fused_lora"}
    assert on("cluster=slurm") == set(planned_speed.RESOLVED)
    assert on("cluster=slurm", "cluster.container_image=nemo") == on("cluster=docker", "cluster.image=nemo") == not_ours
    (tmp_path / "transformer_engine.py").touch()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert on("cluster=slurm") == on("cluster=local") == not_ours
    monkeypatch.setenv("CC", "nowhere")
    assert on("cluster=slurm") == on("cluster=local") == without_compiler
    assert on("cluster=docker", "cluster.image=nemo") == not_ours


@pytest.mark.parametrize(
    ("name", "kind", "rule"),
    [
        ("cuda_graphs", Accelerator.cpu, "there is no GPU"),
        ("compile", Accelerator.cpu, "attention of packed sequences has no CPU kernel"),
    ],
)
def test_an_optimization_that_cannot_work_is_refused(
    default_config: RunConfig, name: str, kind: Accelerator, rule: str
) -> None:
    with pytest.raises(UserError, match=rf"speed\.{name}=always: {rule}.*; set speed\.{name}=auto or never"):
        settled(default_config, kind, **{name: When.always})


@pytest.fixture
def default_config() -> RunConfig:
    return composed()


def test_what_is_written_has_the_figures_of_the_results() -> None:
    """Compare with what `python benchmarks/throughput.py --table` and `speed_optimizations.py --table` print."""
    from benchmarks import speed_optimizations
    from benchmarks.throughput import RESULTS
    from benchmarks.throughput_table import table

    tables = dict.fromkeys(RESULTS.glob("throughput-h200*.json"), table)
    tables |= dict.fromkeys(RESULTS.glob("speed_optimizations-h200*.json"), speed_optimizations.table)
    rows = [
        line
        for path, shown in tables.items()
        for line in shown(json.loads(path.read_text(encoding="utf-8"))).splitlines()
        if line.startswith("| ") and not line.startswith(("| training", "| speed optimization"))
    ]
    written = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/speed.md")]
    assert len(rows) >= 25 and [row for row in rows if row not in "".join(written)] == []
