"""The slots that trials run on: GPUs, CPU cores, or places in Slurm's queue."""

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
    """The resources of one trial at a time."""

    gpus: tuple[str, ...]
    """GPUs as in CUDA_VISIBLE_DEVICES; empty on a CPU."""
    cost: float
    """Number of GPUs that a trial is charged for; shared ones count in part."""
    cores: int

    def environment(self, cluster: ClusterConfig) -> dict[str, str]:
        """Return the environment of a trial's processes; the user's own OMP_NUM_THREADS is kept."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus), SHARE: str(self.cost / len(self.gpus))}
        threads = max(1, self.cores // cluster.devices)
        share = min(1.0, self.cores / cpu_cores())
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), SHARE: str(share)}


def make_slots(config: LauncherConfig, clusters: Sequence[ClusterConfig], jobs: int) -> list[Slot]:
    """Make the slots of a sweep.

    ``clusters`` are the trials', with the accelerator resolved; ``jobs`` is the default of ``hydra.launcher.jobs``.

    Raises:
        UserError: there are fewer GPUs than a trial needs, or an option has no effect.
    """
    if any(isinstance(cluster, ContainerConfig) for cluster in clusters):
        raise UserError("a sweep runs with cluster=local or cluster=slurm; other clusters are not submitted to")
    if any(isinstance(cluster, SlurmConfig) for cluster in clusters):
        return _job_slots(config, clusters, jobs)
    if config.jobs is not None:
        raise UserError(f"hydra.launcher.jobs ({config.jobs}) has no effect on this machine; remove it")
    on_gpu = [cluster for cluster in clusters if cluster.accelerator is Accelerator.gpu]
    return _gpu_slots(config, on_gpu) if on_gpu else _cpu_slots(config)


def _job_slots(config: LauncherConfig, clusters: Sequence[ClusterConfig], jobs: int) -> list[Slot]:
    if not all(isinstance(cluster, SlurmConfig) for cluster in clusters):
        raise UserError("cluster=local,slurm: the trials of a sweep run all here or all on Slurm; make two sweeps")
    for key in ("gpus", "gpus_per_trial", "cpu_slots"):
        value = getattr(config, key)
        if value is not None:
            raise UserError(
                f"hydra.launcher.{key} ({_format(value)}) has no effect on Slurm jobs; see cluster.devices and "
                "hydra.launcher.jobs"
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
            f"a trial needs {size} GPUs (cluster.devices, hydra.launcher.gpus_per_trial), and the sweep has "
            f"{len(names)} ({', '.join(names) or 'none'}); lower it, or list more in hydra.launcher.gpus"
        )
    sets = [tuple(names[start : start + size]) for start in range(0, len(names) - size + 1, size)]
    # Every set appears once before one appears again, so that the first trials spread over all GPUs.
    return [
        Slot(gpus, size / config.trials_per_gpu, cpu_cores()) for _ in range(config.trials_per_gpu) for gpus in sets
    ]


def gpu_names() -> list[str]:
    """Return the names of the visible GPUs, as in CUDA_VISIBLE_DEVICES."""
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
            f"hydra.launcher.gpus ({', '.join(gpus)}) names a GPU twice; set hydra.launcher.trials_per_gpu to share it"
        )
    return list(gpus)


def _cpu_slots(config: LauncherConfig) -> list[Slot]:
    for key, value in (("gpus", config.gpus), ("gpus_per_trial", config.gpus_per_trial)):
        if value is not None:
            raise UserError(
                f"hydra.launcher.{key} ({_format(value)}) has no effect: the trials run on the CPU; remove it, or set "
                "cluster.accelerator"
            )
    cores = cpu_cores()
    count = config.cpu_slots if config.cpu_slots is not None else max(1, cores // 2)
    return [Slot((), 0.0, max(1, cores // count))] * count


def _format(value: int | list[str]) -> str:
    return str(value) if isinstance(value, int) else ", ".join(value)
