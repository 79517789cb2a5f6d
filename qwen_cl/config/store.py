"""Registry of the schemas that conf/*.yaml extends."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import get_origin

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qwen_cl.config import cluster, data, model, peft, replay, resume, run, speed, sweep, task
from qwen_cl.config.config_files import read_renamed_keys
from qwen_cl.config.paths import PACKAGE
from qwen_cl.config.task.training import TaskConfig


def _task_schemas() -> dict[str, type]:
    """Return the config class of each task in config/task, ``FinetuneConfig`` as ``finetune_schema``."""
    modules = [import_module(f"{task.__name__}.{found.name}") for found in iter_modules(task.__path__)]
    kinds = [kind for module in modules for kind in vars(module).values() if _is_task(kind)]
    extended = {base for kind in kinds for base in kind.__bases__}
    return {f"{kind.__name__.removesuffix('Config').lower()}_schema": kind for kind in kinds if kind not in extended}


def _is_task(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, TaskConfig)


GROUPS: dict[str, dict[str, type]] = {
    "model": {"model_schema": model.ModelConfig},
    "task": _task_schemas(),
    "peft": {"full_schema": peft.PeftConfig, "lora_schema": peft.LoraConfig, "dora_schema": peft.DoraConfig},
    "data": {
        "demo_schema": data.DemoDataConfig,
        "file_schema": data.FileDataConfig,
        "mock_schema": data.MockDataConfig,
        "text_schema": data.TextDataConfig,
    },
    "replay": {
        "replay_schema": replay.ReplayConfig,
        "file_replay_schema": replay.FileReplayConfig,
        "generated_replay_schema": replay.GeneratedReplayConfig,
    },
    "retention": {"retention_schema": replay.RetentionConfig},
    "resume": {"auto_resume_schema": resume.AutoResumeConfig, "never_resume_schema": resume.ResumeConfig},
    "cluster": {
        "local_schema": cluster.LocalConfig,
        "slurm_schema": cluster.SlurmConfig,
        "docker_schema": cluster.DockerConfig,
        "kubernetes_schema": cluster.KubernetesConfig,
        "skypilot_schema": cluster.SkypilotConfig,
    },
    "speed": {"speed_schema": speed.SpeedConfig},
}


HYDRA_GROUPS: dict[str, dict[str, type]] = {
    "hydra/launcher": {"processes_schema": sweep.LauncherConfig},
    "hydra/sweeper": {"grid_schema": sweep.GridConfig, "optuna_schema": sweep.OptunaConfig},
}
"""Groups of the launcher and sweeper, which are not part of a run's config."""


def register_schemas() -> None:
    """Register all schemas, and the resolver ``${package_path:…}`` for files of this package. May be called again."""
    read_renamed_keys()
    store = ConfigStore.instance()
    store.store(name="run_schema", node=run.RunConfig)
    for group, schemas in {**GROUPS, **HYDRA_GROUPS}.items():
        for name, node in schemas.items():
            store.store(group=group, name=name, node=_with_open_mappings(node))
    OmegaConf.register_new_resolver("package_path", lambda relative: str(PACKAGE / relative), replace=True)


def _with_open_mappings(schema: type) -> DictConfig:
    """Return the schema with open mappings, whose keys are user-defined names that Hydra would refuse."""
    node: DictConfig = OmegaConf.structured(schema)
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig) and get_origin(child._metadata.ref_type) is dict:
            OmegaConf.set_struct(child, False)
    return node
