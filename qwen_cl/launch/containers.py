"""Render a run as a container for Docker, Kubernetes or SkyPilot. Nothing is submitted.

The container does what this command would do on a machine of its own: it plans, downloads, trains and resumes. NeMo-Run
builds the TrainJob. Its Docker executor cannot render text, and its SkyPilot executor needs SkyPilot, whose
dependencies conflict with the versions that NeMo pins.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields

import yaml

from qwen_cl.config.cluster import (
    Accelerator,
    ContainerConfig,
    DockerConfig,
    KubernetesConfig,
    LocalConfig,
    SkypilotConfig,
)
from qwen_cl.config.overrides import override_key, quoted
from qwen_cl.config.paths import ROOT
from qwen_cl.config.run import RunConfig
from qwen_cl.launch.local import paths_to_mount, run_variables
from qwen_cl.runs.folder import RunFolder

KEYS = ("WANDB_API_KEY", "HF_TOKEN")
"""Environment variables with secrets: passed by name, never by value."""


def render_container(config: RunConfig, folder: RunFolder, overrides: Sequence[str]) -> tuple[str, str]:
    """Return the kind of the rendered text, and the text. ``overrides`` are those of this command."""
    cluster = config.cluster
    if isinstance(cluster, DockerConfig):
        return "docker command", _docker(cluster, config, folder, overrides)
    if isinstance(cluster, KubernetesConfig):
        return "TrainJob, for kubectl create -f -", _kubernetes(cluster, folder, overrides)
    assert isinstance(cluster, SkypilotConfig)
    return "task, for sky launch --secret NAME", _skypilot(cluster, folder, overrides)


def _docker(cluster: DockerConfig, config: RunConfig, folder: RunFolder, overrides: Sequence[str]) -> str:
    cache = run_variables(config)["HF_HUB_CACHE"]
    words = ["docker", "run", "--rm", "--init", "--ipc=host"]
    if cluster.accelerator is Accelerator.gpu:
        words.append(f"--gpus={cluster.devices}")
    words += [f"--volume={path}:{path}" for path in paths_to_mount(config, folder.directory)]
    words += [f"--volume={mount}" for mount in cluster.mounts]
    words += [f"--env=HF_HUB_CACHE={cache}", *(f"--env={name}" for name in KEYS), f"--workdir={ROOT}"]
    return shlex.join([*words, cluster.image, *_command(cluster, str(folder.directory), overrides)])


def _kubernetes(cluster: KubernetesConfig, folder: RunFolder, overrides: Sequence[str]) -> str:
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    class OfflineExecutor(KubeflowExecutor):
        def __post_init__(self) -> None:
            """Skip connecting to the cluster: the job is only rendered."""

    volume = {"name": "outputs", "persistentVolumeClaim": {"claimName": cluster.volume_claim}}
    has_volume = cluster.volume_claim is not None
    executor = OfflineExecutor(
        runtime_ref=cluster.runtime,
        namespace=cluster.namespace,
        image=cluster.image,
        nprocs_per_node=1,  # the launcher, which starts the others
        gpus_per_node=cluster.devices if cluster.accelerator is Accelerator.gpu else None,
        volumes=[volume] if has_volume else [],
        volume_mounts=[{"name": "outputs", "mountPath": cluster.volume_path}] if has_volume else [],
        env_list=[_secret(cluster.secret, name) for name in KEYS] if cluster.secret else [],
        container_kwargs={"args": []},
    )
    directory = f"{cluster.volume_path}/{folder.directory.parent.name}/{folder.directory.name}"
    command = f"cd {shlex.quote(cluster.checkout)} && exec {shlex.join(_command(cluster, directory, overrides))}"
    body = executor.get_job_body(_dns_name(folder), ["bash", "-c", command])
    return yaml.safe_dump(body, sort_keys=False, width=1000)


def _secret(secret: str, key: str) -> dict[str, object]:
    return {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}


def _skypilot(cluster: SkypilotConfig, folder: RunFolder, overrides: Sequence[str]) -> str:
    resources: dict[str, object] = {"image_id": f"docker:{cluster.image}", "use_spot": cluster.use_spot}
    if cluster.accelerator is Accelerator.gpu:
        resources["accelerators"] = {cluster.gpu: cluster.devices}
    if cluster.infra is not None:
        resources["infra"] = cluster.infra
    directory = f"outputs/{folder.directory.parent.name}/{folder.directory.name}"
    task = {
        "name": _dns_name(folder),
        "workdir": str(ROOT),
        "num_nodes": 1,
        "resources": resources,
        "secrets": dict.fromkeys(KEYS),
        "run": shlex.join(_command(cluster, directory, overrides)),
    }
    return yaml.safe_dump({**task, "setup": cluster.setup} if cluster.setup else task, sort_keys=False, width=1000)


def _command(cluster: ContainerConfig, directory: str, overrides: Sequence[str]) -> list[str]:
    """Return the launcher's command inside the container."""
    passed = [each for each in overrides if override_key(each).partition(".")[0] not in ("cluster", "dry_run", "hydra")]
    values = {field.name: getattr(cluster, field.name) for field in fields(LocalConfig)}
    cluster_overrides = [f"cluster.{name}={getattr(value, 'value', value)}" for name, value in values.items()]
    where = directory if re.fullmatch(r"[\w./-]+", directory) else quoted(directory)
    return ["python", "launch.py", f"hydra.run.dir={where}", *passed, "cluster=local", *cluster_overrides]


def _dns_name(folder: RunFolder) -> str:
    """Return a DNS name that Kubernetes accepts."""
    name = f"{folder.directory.parent.name}-{folder.directory.name}".lower()
    return re.sub(r"[^a-z0-9]+", "-", f"qwen-cl-{name}")[:50].strip("-")
