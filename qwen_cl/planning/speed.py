"""Speed optimizations of a run: resolves ``auto``, and refuses what cannot work."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from qwen_cl.config.cluster import Accelerator, LocalConfig, Precision, SlurmConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.run import RunConfig
from qwen_cl.config.speed import SpeedConfig, When
from qwen_cl.models.adapter_methods import adapter_of

FASTER_ON_CPU = ("fused_lora",)
"""Measured with the demo model (benchmarks/speed_optimizations.py); compiled layers gain less than compiling takes."""
COMPILED = ("compile", "fused_linear_cross_entropy", "fused_grad_accumulation")
UNTESTED_WITH_TRANSFORMER_ENGINE = ("compile", "cuda_graphs", "fused_grad_accumulation")
"""Optimizations that are untested with Transformer Engine."""
NO_COMPILER = "there is no C compiler on {} (gcc or clang, and g++ for a CPU; or as set by CC and CXX)"
RESOLVED = (*COMPILED, "fused_lora", "cuda_graphs")


def resolve_speed(config: RunConfig, kind: Accelerator) -> SpeedConfig:
    """Resolve every ``auto`` of the group ``speed`` for a run on devices of this ``kind``.

    Raises:
        UserError: an optimization is requested that this run cannot use.
    """
    speed = config.speed
    chosen: dict[str, Any] = {}
    for name in RESOLVED:
        requested = getattr(speed, name)
        obstacle = _obstacle(name, config, kind)
        if requested is When.always and obstacle:
            raise UserError(f"speed.{name}=always: {obstacle}; set speed.{name}=auto or never")
        enabled = requested is When.auto and not obstacle and _gains(name, config, kind)
        chosen[name] = When.always if requested is When.always or enabled else When.never
    if speed.activation_recompute is When.auto:
        chosen["activation_recompute"] = (
            When.never
        )  # for qwen_cl/planning/micro_batch.py to change, which knows the memory
    return replace(speed, **chosen)


def _obstacle(name: str, config: RunConfig, kind: Accelerator) -> str | None:
    """Return the reason why this run cannot use an optimization; None if it can."""
    cluster, adapter = config.cluster, adapter_of(config.peft)
    dropout = 0.0 if adapter is None else adapter.dropout
    if name == "fused_lora" and (adapter is None or not adapter.entry.fused):
        return "there is no LoRA in this run (peft=lora)"
    if name == "fused_lora" and dropout > 0:
        return f"with peft.dropout ({dropout}) adapter and layer have different inputs"
    if isinstance(cluster, LocalConfig) and _needs_compiler(name, kind) and not _has_compiler(kind):
        return NO_COMPILER.format("this machine")
    if name == "compile" and (obstacle := _compile_obstacle(config, kind)):
        return obstacle
    if name == "cuda_graphs" and kind is not Accelerator.gpu:
        return "there is no GPU"
    if name == "cuda_graphs" and config.speed.activation_recompute is When.always:
        return "captured CUDA graphs cannot recompute activations, and speed.activation_recompute is always"
    if name == "cuda_graphs" and cluster.tensor_parallel * cluster.pipeline_parallel * cluster.context_parallel > 1:
        return "a CUDA graph captures the complete model, and in this cluster layout each process has a part of it"
    if name in ("compile", "cuda_graphs") and config.training.is_packed and cluster.precision is Precision.fp32:
        return "attention of packed sequences only has a bf16 kernel, and cluster.precision is fp32"
    if name == "cuda_graphs" and dropout > 0:
        return f"captured CUDA graphs do not use the run's seed, and peft.dropout is {dropout}"
    return None


def _compile_obstacle(config: RunConfig, kind: Accelerator) -> str | None:
    if config.cluster.context_parallel > 1:
        return (
            "attention communicates with other ranks, and cluster.context_parallel is "
            f"{config.cluster.context_parallel}"
        )
    if kind is not Accelerator.gpu and config.training.is_packed:
        return "attention of packed sequences has no CPU kernel, and task.packing is true"
    return None


def has_static_shapes(config: RunConfig) -> bool:
    """Return True if all packed batches have one shape, as compiled layers and captured CUDA graphs need.
    ``config.speed`` is resolved."""
    return config.training.is_packed and When.always in (config.speed.compile, config.speed.cuda_graphs)


def _gains(name: str, config: RunConfig, kind: Accelerator) -> bool:
    """Return whether the optimization is faster here.

    All together are 3.1 times as fast on one H200 (benchmarks/speed_optimizations.py), and faster at data and pipeline
    parallel 2, but not at tensor parallel 2: 27,000 tokens/s with and 31,000 without (0.5B, benchmarks/two_gpus.py).
    """
    cluster = config.cluster
    if cluster.tensor_parallel > 1:
        return False
    if kind is Accelerator.cpu:
        return name in FASTER_ON_CPU
    same_packages = isinstance(cluster, LocalConfig) or (
        isinstance(cluster, SlurmConfig) and cluster.container_image is None
    )
    if same_packages and name in COMPILED and not _has_compiler(kind):
        return False  # nodes mostly have the compilers of the login node
    return name not in UNTESTED_WITH_TRANSFORMER_ENGINE or (same_packages and find_spec("transformer_engine") is None)


def require_compiler(config: RunConfig) -> None:
    """Check the node of the run, which may not be the machine that planned it.

    Raises:
        UserError: an optimization needs a C compiler, and there is none.
    """
    kind = config.cluster.accelerator
    affected = [
        name
        for name in RESOLVED
        if getattr(config.speed, name) is When.always and _needs_compiler(name, kind) and not _has_compiler(kind)
    ]
    if affected:
        raise UserError(
            f"speed.{affected[0]}=always: {NO_COMPILER.format(platform.node())}; load one in cluster.setup, or set "
            + " ".join(f"speed.{name}=never" for name in affected)
        )


def _needs_compiler(name: str, kind: Accelerator) -> bool:
    return name in COMPILED and (name != "fused_linear_cross_entropy" or kind is Accelerator.gpu)


def _has_compiler(kind: Accelerator) -> bool:
    """Return True if the compiler that torch and Triton would call exists."""
    variable, usual = ("CC", ["gcc", "clang"]) if kind is Accelerator.gpu else ("CXX", ["g++"])
    return any(shutil.which(name) for name in ([os.environ[variable]] if os.environ.get(variable) else usual))
