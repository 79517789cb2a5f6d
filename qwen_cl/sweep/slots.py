"""The parts of the machine that trials run on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_cl.config.cluster import Accelerator, ClusterConfig, ContainerConfig, SlurmConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.sweep import LauncherConfig
from qwen_cl.planning.devices import cpu_cores, visible_gpus
from qwen_cl.planning.micro_batch import SHARE


@dataclass(frozen=True, slots=True)
class Slot:
    gpus: tuple[str, ...]
    """As in CUDA_VISIBLE_DEVICES; none on a CPU."""
    cost: float
    """GPUs' worth of time that a trial here takes: those it shares count in part."""
    cores: int

    def environment(self, cluster: ClusterConfig) -> dict[str, str]:
        """What the processes of a trial are told. Whoever set OMP_NUM_THREADS knows better."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus), SHARE: str(self.cost / len(self.gpus))}
        threads = max(1, self.cores // cluster.devices)
        share = min(1.0, self.cores / cpu_cores())
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), SHARE: str(share)}


def make_slots(config: LauncherConfig, clusters: Sequence[ClusterConfig], jobs: int) -> list[Slot]:
    """``clusters`` are the trials', with the accelerator settled; ``jobs`` is how many go into a cluster's queue at
    once, unless the config says.

    Raises:
        UserError: there are fewer GPUs than a trial needs, or some are not there.
    """
    if any(isinstance(cluster, ContainerConfig) for cluster in clusters):
        raise UserError("a sweep runs with cluster=local or cluster=slurm; nothing else is submitted from here")
    if any(isinstance(cluster, SlurmConfig) for cluster in clusters):
        return _job_slots(config, clusters, jobs)
    if config.jobs is not None:
        raise UserError(f"hydra.launcher.jobs ({config.jobs}) would change nothing on this machine; remove it")
    on_gpu = [cluster for cluster in clusters if cluster.accelerator is Accelerator.gpu]
    return _gpu_slots(config, on_gpu) if on_gpu else _cpu_slots(config)


def _job_slots(config: LauncherConfig, clusters: Sequence[ClusterConfig], jobs: int) -> list[Slot]:
    if not all(isinstance(cluster, SlurmConfig) for cluster in clusters):
        raise UserError("cluster=local,slurm: the trials of a sweep run here or there; make two sweeps of them")
    for key in ("gpus", "gpus_per_trial", "cpu_slots"):
        value = getattr(config, key)
        if value is not None:
            raise UserError(
                f"hydra.launcher.{key} ({_shown(value)}) would change nothing: the trials are Slurm's; see "
                "cluster.devices and hydra.launcher.jobs"
            )
    gpus = max(cluster.world_size if cluster.accelerator is Accelerator.gpu else 0 for cluster in clusters)
    return [Slot((), gpus, 0)] * (config.jobs or jobs)


def _gpu_slots(config: LauncherConfig, clusters: Sequence[ClusterConfig]) -> list[Slot]:
    names = gpu_names() if config.gpus is None else _chosen(config.gpus)
    needed = max(cluster.devices for cluster in clusters)
    size = needed if config.gpus_per_trial is None else config.gpus_per_trial
    if needed > size:
        raise UserError(
            f"cluster.devices ({needed}) is more than hydra.launcher.gpus_per_trial ({size}); raise it, or remove it"
        )
    if size > len(names):
        raise UserError(
            f"a trial takes {size} GPUs (cluster.devices, hydra.launcher.gpus_per_trial) and the sweep has "
            f"{len(names)} ({', '.join(names) or 'none'}); lower it, or give more in hydra.launcher.gpus"
        )
    sets = [tuple(names[start : start + size]) for start in range(0, len(names) - size + 1, size)]
    # Each set once before any a second time: the first trials spread over all GPUs.
    return [
        Slot(gpus, size / config.trials_per_gpu, cpu_cores()) for _ in range(config.trials_per_gpu) for gpus in sets
    ]


def gpu_names() -> list[str]:
    """Of the GPUs that a process started here would see."""
    count, chosen = len(visible_gpus()), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if chosen is None else chosen.split(",")[:count]


def _chosen(gpus: Sequence[str]) -> list[str]:
    visible = gpu_names()
    for name in gpus:
        if name not in visible:
            raise UserError(
                f"hydra.launcher.gpus ({name}) is not visible here; there are {', '.join(visible) or 'none'}"
            )
    if len(set(gpus)) < len(gpus):
        raise UserError(
            f"hydra.launcher.gpus ({', '.join(gpus)}) names one twice; hydra.launcher.trials_per_gpu shares"
        )
    return list(gpus)


def _cpu_slots(config: LauncherConfig) -> list[Slot]:
    for key, value in (("gpus", config.gpus), ("gpus_per_trial", config.gpus_per_trial)):
        if value is not None:
            raise UserError(
                f"hydra.launcher.{key} ({_shown(value)}) would change nothing: the trials run on the CPU; remove it, "
                "or see cluster.accelerator"
            )
    cores = cpu_cores()
    count = config.cpu_slots if config.cpu_slots is not None else max(1, cores // 2)
    return [Slot((), 0.0, max(1, cores // count))] * count


def _shown(value: int | list[str]) -> str:
    return str(value) if isinstance(value, int) else ", ".join(value)
