"""Which levers of the group ``speed`` a run uses: settles ``auto`` and refuses what cannot work."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.config.schema import Accelerator, DoraConfig, LocalConfig, LoraConfig, Precision, RunConfig
from qwen_cl.config.speed import SpeedConfig, When
from qwen_cl.config.tasks import FinetuneConfig

LOSS_CHUNK_BYTES = 3 * 2**29
"""linear_cross_entropy: of the logits of one chunk, in their own type; 5,000 tokens of Qwen2.5 in bf16, whose products
fill any GPU."""
GAIN_ON_CPU = ("low_rank_products",)
"""Of the embedded model, by benchmarks/levers.py; compiled layers gain more, but not what compiling takes."""
SETTLED = ("compile", "linear_cross_entropy", "low_rank_products", "cuda_graphs", "fused_accumulation")


def settle_speed(config: RunConfig, kind: Accelerator) -> SpeedConfig:
    """``kind`` is the run's device. Afterwards nothing is auto.

    Raises:
        UserError: a lever is asked for that this run cannot use.
    """
    speed = config.speed
    chosen: dict[str, Any] = {}
    for name in SETTLED:
        wanted = getattr(speed, name)
        obstacle = _obstacle(name, config, kind)
        if wanted is When.always and obstacle:
            raise UserError(f"speed.{name}=always: {obstacle}; set speed.{name}=auto or never")
        gains = (kind is Accelerator.gpu or name in GAIN_ON_CPU) and not obstacle and not _untried(name, config)
        chosen[name] = When.always if wanted is When.always or (wanted is When.auto and gains) else When.never
    if speed.recompute is When.auto:
        chosen["recompute"] = When.never  # for qwen_cl/micro_batch.py to change, which knows the memory
    return replace(speed, **chosen)


def _obstacle(name: str, config: RunConfig, kind: Accelerator) -> str | None:
    """Why this run cannot use the lever; None where it can."""
    cluster, peft = config.cluster, config.peft
    if name == "low_rank_products" and (not isinstance(peft, LoraConfig) or isinstance(peft, DoraConfig)):
        return "there is no LoRA in this run (peft=lora)"
    if name == "low_rank_products" and isinstance(peft, LoraConfig) and peft.dropout > 0:
        return f"with peft.dropout ({peft.dropout}) adapter and layer have different inputs"
    compiles = name in ("compile", "fused_accumulation") or (name == "linear_cross_entropy" and kind is Accelerator.gpu)
    if compiles and isinstance(cluster, LocalConfig) and not _has_compiler(kind):
        return "there is no C compiler here (gcc or clang, and g++ for a CPU, or CC and CXX)"
    if name == "compile":
        return _compile_obstacle(config, kind)
    if name == "cuda_graphs" and kind is not Accelerator.gpu:
        return "there is no GPU"
    if name == "cuda_graphs" and config.speed.recompute is When.always:
        return "recorded passes cannot be computed again in parts, and speed.recompute is always"
    if name == "cuda_graphs" and cluster.tensor_parallel * cluster.pipeline_parallel * cluster.context_parallel > 1:
        return "it records passes through the whole model, of which each process has a part in this layout of cluster"
    if name in ("compile", "cuda_graphs") and _packed(config) and cluster.precision is Precision.fp32:
        return "attention of packed rows has a kernel in bf16 alone, and cluster.precision is fp32"
    if name == "cuda_graphs" and isinstance(peft, LoraConfig) and peft.dropout > 0:
        return f"recorded passes do not draw from the run's seed, and peft.dropout is {peft.dropout}"
    return None


def _compile_obstacle(config: RunConfig, kind: Accelerator) -> str | None:
    if config.cluster.context_parallel > 1:
        return f"attention talks to other ranks, and cluster.context_parallel is {config.cluster.context_parallel}"
    if kind is not Accelerator.gpu and _packed(config):
        return "attention of packed rows has no kernel on a CPU, and task.packing is true"
    return None


def _packed(config: RunConfig) -> bool:
    return isinstance(config.task, FinetuneConfig) and config.task.packing


def has_static_shapes(config: RunConfig) -> bool:
    """Whether packed rows are all as long as task.sequence_length and a batch has as many segments: what is compiled or
    recorded is so for one shape. ``config.speed`` is settled."""
    return _packed(config) and When.always in (config.speed.compile, config.speed.cuda_graphs)


def _untried(name: str, config: RunConfig) -> bool:
    """What nobody has run on a GPU is there to be asked for, and is nobody's default: several GPUs, a cluster, whose
    containers may have Transformer Engine's layers, those layers, and packed rows."""
    if name not in ("compile", "cuda_graphs", "fused_accumulation"):
        return config.cluster.tensor_parallel > 1
    elsewhere = not isinstance(config.cluster, LocalConfig) or config.cluster.world_size > 1
    return elsewhere or find_spec("transformer_engine") is not None or _packed(config)


def _has_compiler(kind: Accelerator) -> bool:
    names = [os.environ.get("CC"), "gcc", "clang"] if kind is Accelerator.gpu else [os.environ.get("CXX"), "g++"]
    return any(shutil.which(name) for name in names if name)
