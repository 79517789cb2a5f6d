"""The task export in this process."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_cl.config.run import RunConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.config.task.export import ExportConfig
from qwen_cl.inference.export import export
from qwen_cl.runs.manifest import CheckpointManifest, SavedFile, file_names, hash_files, write_checkpoint_manifest
from tests.conftest import ROOT
from tests.support.invocations import invocation


def composed(*overrides: str) -> RunConfig:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return cast(RunConfig, OmegaConf.to_object(compose("config", list(overrides))))


def run_export(*said: str) -> None:
    """Do what a launch does after Hydra has composed the config; faster, as torch is already imported."""
    config = composed("task=export", *said)
    assert isinstance(config.task, ExportConfig)
    export(config, config.task, invocation(*said))


def seal(checkpoint: Path) -> None:
    """Write a manifest of the existing files, as a run that saved them would."""
    names = file_names(checkpoint)
    hashes = hash_files(checkpoint, names)
    files = {name: SavedFile((checkpoint / name).stat().st_size, hashes[name]) for name in names}
    write_checkpoint_manifest(checkpoint, CheckpointManifest(int(checkpoint.name.partition("=")[2]), None, files))
