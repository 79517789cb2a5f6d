"""A run's config as a file: written when the run starts, read back by its processes."""

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
"""Of messages that hold a special token's name, which older runs took for the token, there are too few to refuse them
all for it."""
ADDED_SINCE: dict[str, dict[str, Any]] = {
    "model_schema": {"adapter": None},
    "demo_schema": {**CHAT},
    "file_schema": {**CHAT, "fields": {}, "subset": None, "near_duplicates": "move"},
    "text_schema": {**CHAT, "fields": {}, "document_separator": "file", "near_duplicates": "move"},
}
"""By schema, keys that configs of older runs lack, with what those runs did."""


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Plain values; each group says by ``type`` which of its schemas it is."""
    plain: dict[str, Any] = map_text(_escaped_plain(config), unescape)
    return plain


def save_config(config: RunConfig, path: Path) -> None:
    OmegaConf.save(OmegaConf.create(_escaped_plain(config)), path)


def _escaped_plain(config: RunConfig) -> dict[str, Any]:
    """As OmegaConf takes it: of what is resolved, what reads like an interpolation was typed so."""
    escaped = OmegaConf.structured(map_text(config, escape))
    plain = cast(dict[str, Any], OmegaConf.to_container(escaped, enum_to_str=True))
    for group, schemas in GROUPS.items():
        kind = type(getattr(config, group))
        name = next(name for name, schema in schemas.items() if schema is kind)
        plain[group] = {"type": name.removesuffix("_schema"), **plain[group]}
    return plain


def read_plain(path: Path) -> dict[str, Any]:
    """Read what :func:`save_config` wrote, as plain values under today's keys."""
    return rename_mapping(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path))))


def read_overrides(directory: Path) -> list[str] | None:
    """Read the overrides that a run was started with, under today's keys; None where its ``directory`` has none."""
    path = directory / ".hydra" / "overrides.yaml"
    return rename_overrides(map(str, OmegaConf.load(path))) if path.is_file() else None


def load_config(path: Path) -> RunConfig:
    """The inverse of :func:`save_config`, with every rule checked again."""
    plain = read_plain(path)
    base = OmegaConf.structured(RunConfig)
    for group, schemas in GROUPS.items():
        name = plain[group].pop("type") + "_schema"
        base[group] = OmegaConf.structured(schemas[name])
        plain[group] = {**ADDED_SINCE.get(name, {}), **plain[group]}
    return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(base, plain)))


def read_run_config(path: Path) -> RunConfig:
    """Of a run's folder, which anybody may have written to.

    Raises:
        UserError: it is no run's config.
    """
    try:
        return load_config(path)
    except (OmegaConfBaseException, UserError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a run's config, or of another version: {reason}") from error
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a run's config: {error!r}") from error


def leaves_of_consequence(plain: dict[str, Any]) -> dict[str, Any]:
    """Return what :func:`to_plain` gave, by full key, without the keys that nothing depends on."""
    return {key: value for key, value in _leaves(plain).items() if affects(key) is not Affects.nothing}


def leaves_to_compare(plain: dict[str, Any]) -> dict[str, Any]:
    """:func:`leaves_of_consequence` less the keys that say what runs did before there were these keys: so those of an
    older run, which lacks them, are the same."""
    before = {
        f"{group}.{name}": value
        for group in GROUPS
        if group in plain
        for name, value in ADDED_SINCE.get(f"{plain[group].get('type')}_schema", {}).items()
    }
    found = leaves_of_consequence(plain)
    return {key: value for key, value in found.items() if key not in before or before[key] != value}


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {name: leaf for part in value for name, leaf in _leaves(value[part], f"{key}.{part}".lstrip(".")).items()}
