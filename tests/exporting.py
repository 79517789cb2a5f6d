"""``task=export`` in this process."""

from __future__ import annotations

from typing import cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_cl.config.schema import RunConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.config.tasks import ExportConfig
from qwen_cl.export import export
from tests.conftest import ROOT


def composed(*overrides: str) -> RunConfig:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return cast(RunConfig, OmegaConf.to_object(compose("config", list(overrides))))


def run_export(*said: str) -> None:
    """What a launch does once Hydra has composed the config: seconds cheaper, because torch is imported already."""
    config = composed("task=export", *said)
    assert isinstance(config.task, ExportConfig)
    export(config, config.task, list(said))
