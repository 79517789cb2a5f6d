"""Devices of this machine, as reported by the driver: torch would take seconds and memory of each GPU."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace

from qwen_cl.config.cluster import Accelerator, ClusterConfig, LocalConfig, Precision
from qwen_cl.config.errors import UserError


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Device:
    """The device of every rank of a run."""

    kind: Accelerator
    """Resolved: gpu or cpu."""
    precision: Precision
    """Resolved: fp32 or bf16."""
    name: str
    memory_bytes: int | None
    """Bytes of one GPU, or of the machine for a CPU; None if it is another machine."""


def visible_gpus() -> list[Gpu]:
    """Return the GPUs visible to a process started here, in the order of CUDA_VISIBLE_DEVICES."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a deprecated package of the same name may come first
        import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        found = {}
        for index, handle in enumerate(handles):
            gpu = Gpu(pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            found[str(index)] = found[pynvml.nvmlDeviceGetUUID(handle)] = gpu
    finally:
        pynvml.nvmlShutdown()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [found[str(index)] for index in range(len(handles))]
    return [found[name] for name in chosen.split(",") if name in found]


def pick_device(cluster: ClusterConfig) -> Device:
    """Resolve ``auto``, and refuse devices that the machine does not have.

    Raises:
        UserError: fewer devices are available than requested.
    """
    if not isinstance(cluster, LocalConfig) and cluster.accelerator is Accelerator.cpu:
        return Device(Accelerator.cpu, _precision(cluster, Precision.fp32), "CPU of the cluster", None)
    if not isinstance(cluster, LocalConfig):
        return Device(Accelerator.gpu, _precision(cluster, Precision.bf16), "GPU of the cluster", None)
    gpus = [] if cluster.accelerator is Accelerator.cpu else visible_gpus()
    if not gpus and cluster.accelerator is not Accelerator.gpu:
        return _cpu(cluster)
    if cluster.devices > len(gpus):
        raise UserError(
            f"cluster.devices ({cluster.devices}) is more than the available GPUs ({len(gpus)}); lower it"
            + ("" if gpus else ", or set cluster.accelerator=cpu")
        )
    return Device(Accelerator.gpu, _precision(cluster, Precision.bf16), gpus[0].name, gpus[0].memory_bytes)


def single_process(cluster: ClusterConfig) -> ClusterConfig:
    """Return the cluster with a single process, which holds the complete model."""
    return replace(
        cluster, devices=1, tensor_parallel=1, pipeline_parallel=1, context_parallel=1, sequence_parallel=False
    )


def cpu_cores() -> int:
    """Return the number of cores available to this process."""
    import psutil

    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


def _cpu(cluster: ClusterConfig) -> Device:
    import psutil

    cores = cpu_cores()
    if cluster.accelerator is Accelerator.auto and cluster.devices > cores:
        raise UserError(
            f"cluster.devices ({cluster.devices}) is more than the available devices: no GPU, {cores} CPU cores; "
            "lower it, or set cluster.accelerator=cpu to let processes share cores"
        )
    return Device(Accelerator.cpu, _precision(cluster, Precision.fp32), "CPU", psutil.virtual_memory().total)


def _precision(cluster: ClusterConfig, default: Precision) -> Precision:
    return default if cluster.precision is Precision.auto else cluster.precision
