"""The config file of a run: written at the start, read by its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Affects, affects
from qwen_cl.config.override_text import escape, map_text, unescape
from qwen_cl.config.renamed_keys import rename_mapping, rename_overrides
from qwen_cl.config.run import RunConfig
from qwen_cl.config.store import GROUPS

CHAT = {"system_prompt": None, "chat_template": None, "template_date": None, "special_tokens_in_content": False}
"""Chat settings of earlier runs. They encoded names of special tokens as tokens, which is too rare to refuse them."""
ADDED_SINCE: dict[str, dict[str, Any]] = {
    "model_schema": {"adapter": None},
    "demo_schema": {**CHAT},
    "file_schema": {**CHAT, "fields": {}, "subset": None, "near_duplicates": "move"},
    "text_schema": {**CHAT, "fields": {}, "document_separator": "file", "near_duplicates": "move"},
}
"""By schema, keys missing in configs of earlier runs, with the values that those runs used."""


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain values; ``type`` names the schema of each group."""
    plain: dict[str, Any] = map_text(_escaped_plain(config), unescape)
    return plain


def save_config(config: RunConfig, path: Path) -> None:
    OmegaConf.save(OmegaConf.create(_escaped_plain(config)), path)


def _escaped_plain(config: RunConfig) -> dict[str, Any]:
    """Return plain values with ``${`` escaped, as all interpolations are resolved already."""
    escaped = OmegaConf.structured(map_text(config, escape))
    plain = cast(dict[str, Any], OmegaConf.to_container(escaped, enum_to_str=True))
    for group, schemas in GROUPS.items():
        kind = type(getattr(config, group))
        name = next(name for name, schema in schemas.items() if schema is kind)
        plain[group] = {"type": name.removesuffix("_schema"), **plain[group]}
    return plain


def read_plain(path: Path) -> dict[str, Any]:
    """Read what :func:`save_config` wrote, as plain values under current keys."""
    return rename_mapping(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path))))


def read_overrides(directory: Path) -> list[str] | None:
    """Read the overrides that a run was started with, under current keys; None if its ``directory`` has none."""
    path = directory / ".hydra" / "overrides.yaml"
    return rename_overrides(map(str, OmegaConf.load(path))) if path.is_file() else None


def load_config(path: Path) -> RunConfig:
    """Load what :func:`save_config` wrote, checking every rule again."""
    plain = read_plain(path)
    base = OmegaConf.structured(RunConfig)
    for group, schemas in GROUPS.items():
        name = plain[group].pop("type") + "_schema"
        base[group] = OmegaConf.structured(schemas[name])
        plain[group] = {**ADDED_SINCE.get(name, {}), **plain[group]}
    return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(base, plain)))


def read_run_config(path: Path) -> RunConfig:
    """Load the config of a run folder.

    Raises:
        UserError: the file is not a valid config of a run.
    """
    try:
        return load_config(path)
    except (OmegaConfBaseException, UserError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a run's config, or of another version: {reason}") from error
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a run's config: {error!r}") from error


def result_affecting_leaves(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the values of :func:`to_plain` by full key, without keys that do not affect the run."""
    return {key: value for key, value in _leaves(plain).items() if affects(key) is not Affects.nothing}


def leaves_to_compare(plain: dict[str, Any]) -> dict[str, Any]:
    """Return :func:`result_affecting_leaves` without newer keys that have the behavior of earlier runs, so that configs
    with and without these keys are equal."""
    before = {
        f"{group}.{name}": value
        for group in GROUPS
        if group in plain
        for name, value in ADDED_SINCE.get(f"{plain[group].get('type')}_schema", {}).items()
    }
    found = result_affecting_leaves(plain)
    return {key: value for key, value in found.items() if key not in before or before[key] != value}


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {name: leaf for part in value for name, leaf in _leaves(value[part], f"{key}.{part}".lstrip(".")).items()}
