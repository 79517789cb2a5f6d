"""``task.micro_batch_size=auto``: the largest useful micro batch that fits, and a smaller one after out of memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from qwen_cl.config.cluster import Accelerator
from qwen_cl.config.errors import RunFailed, UserError
from qwen_cl.config.resume import AutoResumeConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import read_run_config
from qwen_cl.config.speed import When
from qwen_cl.config.task.training import AUTO, TrainingConfig
from qwen_cl.models.architecture import Architecture
from qwen_cl.planning.devices import Device
from qwen_cl.planning.memory import batch_shape, estimate_memory
from qwen_cl.planning.speed import resolve_speed
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder

TARGET_TOKENS = {Accelerator.gpu: 16_384, Accelerator.cpu: 2_048}
"""Tokens per micro batch. From 8,192 to 16,384 an H200 gains 6 % (benchmarks/results); the CPU's is a choice."""
USABLE_FRACTION = 0.85
"""Fraction of device memory that the estimate may fill; the rest is for allocators and what it does not cover."""
SHARE = "QWEN_CL_DEVICE_SHARE"
"""Environment variable: a trial's fraction of the device, where trials share devices."""


def resolve_for_device(config: RunConfig, architecture: Architecture, device: Device) -> RunConfig:
    """Resolve speed optimizations and micro batch. ``speed.activation_recompute=auto`` enables recomputation if the
    run does not fit otherwise, by an estimate that is 10 to 20 % too high.

    Raises:
        UserError: see resolve_speed and resolve_micro_batch.
    """
    resolved = resolve_micro_batch(_with_resolved_speed(config, device), architecture, device)
    known = device.memory_bytes is not None and config.speed.activation_recompute is When.auto
    if not known or _fits(resolved, architecture, device, usable=1.0):
        return resolved
    again = replace(config, speed=replace(config.speed, activation_recompute=When.always))
    try:
        return resolve_micro_batch(_with_resolved_speed(again, device), architecture, device)
    except UserError:  # a requested optimization excludes it
        return resolved


def _with_resolved_speed(config: RunConfig, device: Device) -> RunConfig:
    return replace(config, speed=resolve_speed(config, device.kind))


def resolve_micro_batch(config: RunConfig, architecture: Architecture, device: Device) -> RunConfig:
    """Replace ``task.micro_batch_size=auto`` with a number. ``config.speed`` is resolved.

    Raises:
        UserError: it is auto, and the run is for another machine.
    """
    if not is_automatic(config):
        return config
    if device.memory_bytes is None:
        raise UserError(
            "task.micro_batch_size=auto uses the memory of this machine's devices, and the run is for another machine; "
            "write a number"
        )
    tokens = TARGET_TOKENS[device.kind]
    sizes = [size for size in _sizes(config) if size == 1 or size * config.training.sequence_length <= tokens]
    fitting = [size for size in sizes if _fits(with_micro_batch(config, size), architecture, device)]
    return with_micro_batch(config, fitting[-1] if fitting else 1)


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    return replace(config, task=replace(config.training, micro_batch_size=size))


def is_automatic(config: RunConfig) -> bool:
    return isinstance(config.task, TrainingConfig) and config.task.micro_batch_size == AUTO


def reuse_micro_batch(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Return the config with the micro batch of the resumed run, if its layout still allows it."""
    if not is_automatic(config) or not folder.config.exists():
        return config
    before = read_run_config(folder.config).task
    if not isinstance(before, TrainingConfig) or before.micro_batch_size not in _sizes(config):
        return config
    return with_micro_batch(config, before.resolved_micro_batch_size)


def retry_on_oom(config: RunConfig, folder: RunFolder, attempt: Callable[[RunConfig], None]) -> None:
    """Call ``attempt``, again with a smaller micro batch after each out-of-memory failure.

    Raises:
        RunFailed: the last attempt failed.
    """
    while True:
        try:
            attempt(config)
            return
        except RunFailed:
            smaller = [size for size in _sizes(config) if size <= config.training.resolved_micro_batch_size / 2]
            if folder.status().failure_kind is not FailureKind.out_of_memory or not smaller:
                raise
            config = replace(with_micro_batch(config, smaller[-1]), resume=AutoResumeConfig(allow_changes=[]))


def _sizes(config: RunConfig) -> list[int]:
    """Return the sizes that divide the sequences of one rank per step, ascending."""
    rows = config.training.global_batch_size // config.cluster.data_parallel
    return [size for size in range(1, rows + 1) if rows % size == 0]


def _fits(config: RunConfig, architecture: Architecture, device: Device, usable: float = USABLE_FRACTION) -> bool:
    estimate = estimate_memory(
        architecture, batch_shape(config), config.peft, config.cluster, device.precision, config.speed
    )
    assert device.memory_bytes is not None
    on_one = config.cluster.devices if device.kind is Accelerator.cpu else 1  # ranks share a CPU's memory
    share = float(os.environ.get(SHARE, "1"))
    return estimate.total * on_one <= device.memory_bytes * usable * share
