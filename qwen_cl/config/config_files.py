"""Hydra's reader of YAML files, for which renamed keys have their earlier names too."""

from __future__ import annotations

from typing import Any, cast

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from qwen_cl.config.renamed_keys import rename_choices, rename_mapping

GLOBAL = "_global_"


class FileConfigSource(file_config_source.FileConfigSource):
    """The reader of ``file://``; Hydra keeps one class for it, which it knows by this name."""

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        content = cast(dict[str, Any], OmegaConf.to_container(cast(Any, result.config)))
        package = result.header.get("package") or config_path.rpartition("/")[0].replace("/", ".")
        choices = content.pop("defaults", None)
        renamed = rename_mapping(content, "" if package == GLOBAL else package)
        if choices is not None:
            renamed["defaults"] = rename_choices(choices)
        result.config = OmegaConf.create(renamed)
        return result


def read_renamed_keys() -> None:
    """Make Hydra read files by :class:`FileConfigSource`. Idempotent."""
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource
