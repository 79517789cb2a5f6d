"""The cluster group: where a run runs, and its parallelism."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Affects, Scope, setting
from qwen_cl.config.validation import require


class Accelerator(str, Enum):
    auto = "auto"
    gpu = "gpu"
    cpu = "cpu"


class Precision(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    accelerator: Accelerator = field(metadata=setting(Affects.execution, scope=Scope.inference))
    devices: int = field(metadata=setting(Affects.execution))
    """Processes per node: GPUs, or CPU processes."""
    tensor_parallel: int = field(metadata=setting(Affects.execution))
    pipeline_parallel: int = field(metadata=setting(Affects.execution))
    context_parallel: int = field(metadata=setting(Affects.execution))
    sequence_parallel: bool = field(metadata=setting(Affects.execution))
    precision: Precision = field(metadata=setting(scope=Scope.inference))
    timeout_minutes: float = field(metadata=setting(Affects.nothing))
    """Minutes without progress of any rank before the hung rank is reported."""

    def __post_init__(self) -> None:
        for name in ("devices", "tensor_parallel", "pipeline_parallel", "context_parallel"):
            require(f"cluster.{name}", getattr(self, name), at_least=1)
        require("cluster.timeout_minutes", self.timeout_minutes, above=0)
        if self.world_size % self.model_ranks:
            raise UserError(
                f"cluster.tensor_parallel ({self.tensor_parallel}) x cluster.pipeline_parallel "
                f"({self.pipeline_parallel}) x cluster.context_parallel ({self.context_parallel}) must divide the "
                f"number of processes ({self.world_size}); set cluster.devices to a multiple of {self.model_ranks}"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise UserError(
                "cluster.sequence_parallel (true) splits sequences over the tensor parallel ranks, and "
                "cluster.tensor_parallel is 1; raise it, or write cluster.sequence_parallel=false"
            )

    @property
    def world_size(self) -> int:
        return self.devices

    @property
    def data_parallel(self) -> int:
        return self.world_size // self.model_ranks

    @property
    def model_ranks(self) -> int:
        """The number of ranks that together hold one model replica."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel


@dataclass(kw_only=True, slots=True)
class LocalConfig(ClusterConfig):
    """A run on this machine."""


SLURM_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}")
SLURM_OPTION = re.compile(r"[a-z][a-z0-9-]*")
OWN_OPTIONS = {
    "account": "cluster.account",
    "array": "cluster.array",
    "chdir": None,
    "error": None,
    "export": None,
    "gpus-per-node": "cluster.devices",
    "job-name": None,
    "no-requeue": "cluster.max_requeues",
    "nodes": "cluster.nodes",
    "ntasks": "cluster.devices",
    "ntasks-per-node": "cluster.devices",
    "output": None,
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "requeue": "cluster.max_requeues",
    "signal": "cluster.grace_seconds",
    "time": "cluster.time",
    "wrap": None,
}
"""Options of sbatch with a key of their own, or None if the batch script sets them itself."""


@dataclass(kw_only=True, slots=True)
class NodesConfig(ClusterConfig):
    """A run on other machines."""

    nodes: int = field(metadata=setting(Affects.execution))

    def __post_init__(self) -> None:
        require("cluster.nodes", self.nodes, at_least=1)
        if self.accelerator is Accelerator.auto:
            raise UserError("cluster.accelerator (auto) cannot be detected from this machine; write gpu or cpu")
        ClusterConfig.__post_init__(self)

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes


@dataclass(kw_only=True, slots=True)
class SlurmConfig(NodesConfig):
    account: str | None = field(metadata=setting(Affects.nothing))
    """Slurm account; None for the user's default."""
    partition: str | None = field(metadata=setting(Affects.nothing))
    """Slurm partition; None for the cluster's default."""
    qos: str | None = field(metadata=setting(Affects.nothing))
    time: str = field(metadata=setting(Affects.nothing))
    """Wall-clock limit, in Slurm's form (D-HH:MM:SS)."""
    setup: str = field(metadata=setting(Affects.nothing))
    """Shell line run on the node before the worker, for example one that activates a virtual environment."""
    container_image: str | None = field(metadata=setting(Affects.nothing))
    """Container image of the workers, in the form of pyxis; None for no container."""
    container_mounts: list[str] = field(metadata=setting(Affects.nothing))
    """Additional mounts, ``SOURCE:TARGET[:FLAGS]``."""
    options: dict[str, str] = field(metadata=setting(Affects.nothing))
    """Additional long options of sbatch, without dashes; an empty value for flags."""
    grace_seconds: int = field(metadata=setting(Affects.nothing))
    """Seconds before the time limit at which the run receives the stop signal."""
    max_requeues: int = field(metadata=setting(Affects.nothing))
    """Maximum number of requeues after a stop signal of Slurm; 0 for none."""
    array: bool = field(metadata=setting(Affects.nothing))
    """Submit the trials of a sweep as one job array, not as separate jobs."""
    follow: bool = field(metadata=setting(Affects.nothing))
    """Wait and show the progress of the run."""

    def __post_init__(self) -> None:
        require("cluster.grace_seconds", self.grace_seconds, at_least=0, at_most=65535)
        require("cluster.max_requeues", self.max_requeues, at_least=0)
        if not SLURM_TIME.fullmatch(self.time):
            raise UserError(f"cluster.time ({self.time}) must be in Slurm's form: MINUTES, HH:MM:SS or D-HH:MM:SS")
        for key in ("account", "partition", "qos", "container_image"):
            value = getattr(self, key)
            if value is not None and not value.strip():
                raise UserError(f"cluster.{key} is empty; write a name, or null")
        if self.container_mounts and self.container_image is None:
            raise UserError(
                f"cluster.container_mounts ({', '.join(self.container_mounts)}) have no effect without "
                "cluster.container_image; set it, or remove the mounts"
            )
        for name, value in self.options.items():
            _require_option(name, value)
        NodesConfig.__post_init__(self)


@dataclass(kw_only=True, slots=True)
class ContainerConfig(ClusterConfig):
    """A run in a container on another machine, described by a dry run; not submitted."""

    image: str = field(metadata=setting(Affects.execution))

    def __post_init__(self) -> None:
        if self.accelerator is Accelerator.auto:
            raise UserError("cluster.accelerator (auto) cannot be detected from this machine; write gpu or cpu")
        if not self.image.strip():
            raise UserError("cluster.image is empty; name an image that has what pyproject.toml asks for")
        ClusterConfig.__post_init__(self)


@dataclass(kw_only=True, slots=True)
class DockerConfig(ContainerConfig):
    mounts: list[str] = field(metadata=setting(Affects.execution))
    """Additional mounts, ``SOURCE:TARGET[:ro]``."""


@dataclass(kw_only=True, slots=True)
class KubernetesConfig(ContainerConfig):
    namespace: str = field(metadata=setting(Affects.execution))
    runtime: str = field(metadata=setting(Affects.execution))
    """Name of the ClusterTrainingRuntime, of Kubeflow's trainer."""
    checkout: str = field(metadata=setting(Affects.execution))
    """Path of this repository in the image or the volume."""
    volume_claim: str | None = field(metadata=setting(Affects.execution))
    """PersistentVolumeClaim for the output; None for none."""
    volume_path: str = field(metadata=setting(Affects.execution))
    """Mount path of the volume in the container."""
    secret: str | None = field(metadata=setting(Affects.execution))
    """Kubernetes secret with keys named like the environment variables they become; None for none."""


@dataclass(kw_only=True, slots=True)
class SkypilotConfig(ContainerConfig):
    infra: str | None = field(metadata=setting(Affects.execution))
    """Infrastructure like ``aws/us-east-1`` or ``k8s/CONTEXT``; None for the cheapest."""
    gpu: str = field(metadata=setting(Affects.execution))
    """SkyPilot's name of the GPU."""
    setup: str = field(metadata=setting(Affects.nothing))
    """Shell lines run once before the run."""
    use_spot: bool = field(metadata=setting(Affects.execution))


def _require_option(name: str, value: str) -> None:
    key = f"cluster.options.{name}"
    if not SLURM_OPTION.fullmatch(name):
        raise UserError(f"{key} must be a long option of sbatch without its dashes, like mem or gres")
    if name in OWN_OPTIONS:
        other = OWN_OPTIONS[name]
        raise UserError(f"{key} is {f'set by {other}' if other else 'needed by the batch script itself'}; remove it")
    if "\n" in value:
        raise UserError(f"{key} ({value!r}) must be one line")
