"""Translation of Hydra and OmegaConf errors into messages for the user."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from qwen_cl.config.errors import UserError


def explain(error: HydraException | OmegaConfBaseException) -> str:
    """Turn what Hydra or OmegaConf raises while composing into a message in the user's own terms."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_choice(error)
    cause = _omegaconf_cause(error)
    if cause is None:
        return _first_lines(error)
    key = (cause.full_key or "").replace("hydra.hydra", "hydra")
    where = _experiment_file(error)
    if isinstance(cause, MissingMandatoryValue):
        return f"{key} is not set; add {key}=VALUE (its file in conf/ says what it takes)"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        names = list(map(str, cause.parent_node)) if isinstance(cause.parent_node, DictConfig) else []
        return f"{where}{unknown_key(key, [name for name in names if not name.startswith('_')])}"
    if isinstance(cause, ValidationError):
        return f"{where}{key}: {_one_line(cause)}"
    return f"{where}{_one_line(cause)}" if not key else f"{where}{key}: {_one_line(cause)}"


def _omegaconf_cause(error: BaseException) -> OmegaConfBaseException | None:
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OmegaConfBaseException):
            return current
        current = current.__cause__
    return None


def _experiment_file(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, ConfigCompositionException) and text.startswith("In '"):
        return f"conf/{text[4:].split(chr(39), 1)[0]}.yaml: "
    return ""


def refuse_added_keys(cfg: DictConfig, owner: str = "") -> None:
    """Refuse unknown keys added with ``+key=value``, which composition does not check. Raises UserError."""
    schema: Any = OmegaConf.get_type(cfg)
    if not is_dataclass(schema):  # a mapping whose keys are the user's own names
        return
    known = [field.name for field in fields(schema)]
    for name in map(str, cfg):
        key = f"{owner}.{name}" if owner else name
        if name not in known:
            raise UserError(unknown_key(key, known))
        if isinstance(node := cfg._get_node(name), DictConfig):
            refuse_added_keys(node, key)


def unknown_key(key: str, known: list[str]) -> str:
    owner, _, name = key.rpartition(".")
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {owner + '.' if owner else ''}{close[0]}?" if close else ""
    where = f"keys of {owner}" if owner else "keys at the top level"
    return f"{key}: unknown key{meant} ({where}: {', '.join(sorted(known)) or 'none'})"


def _no_such_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    choices = [
        name for name in error.options or [] if not name.endswith("_schema") and not name.startswith("_")
    ]  # parts of them
    close = difflib.get_close_matches(choice, choices, n=1)
    meant = f"; did you mean {group}={close[0]}?" if close else ""
    return f"{group}={choice}: no such choice{meant} (choices: {', '.join(choices)})"


def _one_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]


def _first_lines(error: BaseException) -> str:
    """Return Hydra's message on one line; for an error in a file: the file, the key and the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), None)
    if key is None or not lines[0].startswith("In '"):
        return "; ".join(line for line in lines if "To append to your config" not in line)
    return f"conf/{lines[0].split(chr(39))[1]}.yaml: {key}: {lines[1]}"
