"""Renamed keys and values, which earlier commands, files and run folders still use.

One table for all of them; a line on stderr says each new name, once in a process.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.config.overrides import override_key

KEYS: dict[str, str] = {
    "data.validation_share": "data.validation_fraction",
    "model.locked": "model.require_pinned_revision",
    "replay.sets": "replay.datasets",
    "replay.share": "replay.ratio",
    "resume.allow": "resume.allow_changes",
    "retention.sets": "retention.eval_sets",
    "speed.foreach_gradients": "speed.foreach_grad_clip",
    "speed.fused_accumulation": "speed.fused_grad_accumulation",
    "speed.linear_cross_entropy": "speed.fused_linear_cross_entropy",
    "speed.low_rank_products": "speed.fused_lora",
    "speed.recompute": "speed.activation_recompute",
    "speed.rotary_tables": "speed.rope_cache",
    "task.stages.start_from": "task.stages.init_from",
    "task.stages.teaches": "task.stages.eval_sets",
}
"""By full key; those of a list's items have the list's key before them."""
VALUES: dict[str, dict[str, str]] = {
    "hydra.sweeper.objectives": {"forgotten": "forgetting", "val": "val_loss"},
    "peft.type": {"none": "full"},
    "resume.allow_changes": KEYS,
    "speed": {"plain": "off"},
    "task.loss_on": {"answers": "assistant", "last_answer": "last_assistant"},
}
"""By the key's new name, or by the group whose choices they are."""
STATUS_FIELDS = {
    "began": "phase_started_at",
    "data_hash": "data_sha256",
    "levers": "speed_optimizations",
    "worker_lost": "retriable",
}
"""Fields of status.json."""
SYNONYMS = ("peft.type",)
"""Keys whose earlier values stay valid names, which needs no line."""
reported: set[str] = set()
"""The earlier names that this process has reported."""


def rename_overrides(arguments: Iterable[str]) -> list[str]:
    """Rewrite overrides as a shell hands them over; what is no override stays as it is.

    Raises:
        UserError: a key is given under its old name and under its new one.
    """
    arguments = list(arguments)
    names: dict[str, str] = {}
    for key in map(override_key, arguments):
        now = _replaced(key, KEYS)
        if names.setdefault(now, key) != key:
            _refuse_both(names[now] if key == now else key, now)
    return [_rename_override(argument) for argument in arguments]


def rename_mapping(content: Mapping[str, Any], owner: str = "") -> dict[str, Any]:
    """Rewrite what a YAML file holds; ``owner`` is the key that it is the content of.

    Raises:
        UserError: it has a key under its old name and under its new one.
    """
    changes: dict[str, str] = {}
    renamed: dict[str, Any] = _rename_content(content, owner, changes)
    _report(changes)
    return renamed


def rename_choices(defaults: list[Any]) -> list[Any]:
    """Rewrite the choices of a defaults list of Hydra's, in which YAML reads ``off`` without quotes as false."""
    changes: dict[str, str] = {}
    renamed = [
        {
            key: _rename_content("off" if choice is False else choice, _group_of(key), changes)
            for key, choice in entry.items()
        }
        if isinstance(entry, Mapping)
        else entry
        for entry in defaults
    ]
    _report(changes)
    return renamed


def rename_status(record: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite the fields of a status.json; of a field that is there under both names, today's counts."""
    changes = {old: new for old, new in STATUS_FIELDS.items() if old in record}
    renamed = {new: record[old] for old, new in changes.items()}
    renamed |= {name: value for name, value in record.items() if name not in STATUS_FIELDS}
    used = renamed.get("speed_optimizations")
    if "levers" in record and isinstance(used, Mapping):
        renamed["speed_optimizations"] = {
            _replaced(f"speed.{name}", KEYS).partition(".")[2]: count for name, count in used.items()
        }
    _report({f"status.json: {old}": new for old, new in changes.items()})
    return renamed


def earlier_names(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite a config's leaves as they were spelled before anything was renamed: what is known by a hash of them
    stays known."""
    earlier_keys = {new: old for old, new in KEYS.items()}
    earlier_values = {key: {new: old for old, new in names.items()} for key, names in VALUES.items()}
    return {
        _replaced(key, earlier_keys): earlier_values.get(key, {}).get(value, value) if isinstance(value, str) else value
        for key, value in leaves.items()
    }


def _rename_override(argument: str) -> str:
    name, equals, value = argument.partition("=")
    key = override_key(argument)
    now = _replaced(key, KEYS)
    changes = {} if now == key else {key: now}
    values = VALUES.get(now, {})
    if now == "task.stages":  # a list of mappings, in Hydra's grammar
        names = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in KEYS.items() if old.startswith(now)}
        value = _replaced_words(value, names, r"(?=\s*:)", changes, f"{now}[].")
    elif values:
        value = _replaced_words(value, values, r"(?![\w])", changes, "" if values is KEYS else f"{now}=")
    if now not in SYNONYMS:
        _report(changes)
    return f"{name.replace(key, now, 1)}{equals}{value}"


def _replaced_words(text: str, names: Mapping[str, str], end: str, changes: dict[str, str], prefix: str) -> str:
    def replace(match: re.Match[str]) -> str:
        changes[f"{prefix}{match[0]}"] = f"{prefix}{names[match[0]]}"
        return names[match[0]]

    return re.sub(rf"(?<![\w.])(?:{'|'.join(map(re.escape, names))}){end}", replace, text)


def _rename_content(content: Any, key: str, changes: dict[str, str]) -> Any:
    if isinstance(content, Mapping):
        return _rename_keys(content, key, changes)
    if isinstance(content, list):
        return [_rename_content(item, key, changes) for item in content]
    names = VALUES.get(key, {})
    if not isinstance(content, str) or (now := _replaced(content, names)) == content:
        return content
    if key not in SYNONYMS:
        prefix = "" if names is KEYS else f"{key}="
        changes[f"{prefix}{content}"] = f"{prefix}{now}"
    return now


def _rename_keys(content: Mapping[str, Any], owner: str, changes: dict[str, str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{owner}.{name}" if owner else str(name)
        now = KEYS.get(key, key)
        if now != key:
            changes[key] = now
            if now.rpartition(".")[2] in content:
                _refuse_both(key, now)
        renamed[name if now == key else now.rpartition(".")[2]] = _rename_content(value, now, changes)
    return renamed


def _group_of(key: str) -> str:
    """Find the group in a key of a defaults list: ``speed`` in ``override /speed@_global_``."""
    return key.split()[-1].lstrip("/").partition("@")[0]


def _replaced(key: str, names: Mapping[str, str]) -> str:
    """Put a name, or the longest beginning of it that ends at a dot, by its new one."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        if (start := ".".join(parts[:count])) in names:
            return ".".join([names[start], *parts[count:]])
    return key


def _refuse_both(old: str, new: str) -> None:
    raise UserError(f"{old} and {new} are both given, the earlier and today's name of one key; give {new} alone")


def _report(changes: Mapping[str, str]) -> None:
    unknown = {old: new for old, new in changes.items() if old not in reported}
    if unknown:
        reported.update(unknown)
        print(", ".join(f"{old} is now {new}" for old, new in unknown.items()), file=sys.stderr)
