"""Configs of conf/ with a value for each mandatory key, as a test of one key or choice needs them."""

from __future__ import annotations

import functools
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from qwen_cl.config.run import RunConfig
from qwen_cl.config.store import register_schemas
from tests.conftest import ROOT

STAGE: dict[str, Any] = {"init_from": None, "overrides": [], "eval_sets": []}
"""The values of a stage of which only the name is given."""
MANDATORY: dict[str, Any] = {
    "model.source": "/models/mine",
    "data.path": "/data/train.jsonl",
    "cluster.image": "nemo:25.07",
    "task.run": "/outputs/run",
    "task.stages": [{"name": "only", **STAGE}],
    "replay.datasets": {"english": "/data/old.jsonl"},
    "retention.eval_sets": {"english": "/data/english.jsonl"},
}


@functools.cache  # composing is most of what these tests take; nothing changes what is returned
def compose_config(*overrides: str) -> DictConfig:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", list(overrides))
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, MANDATORY[key], force_add=True)
    return config


def compose_run(*overrides: str) -> RunConfig:
    return cast(RunConfig, OmegaConf.to_object(compose_config(*overrides)))
