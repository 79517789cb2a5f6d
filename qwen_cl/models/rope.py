"""The rotary embedding settings of a config.json, in every form that transformers has written. No torch.

transformers 5 writes one ``rope_parameters``; before, ``rope_theta`` and ``partial_rotary_factor`` were beside
``rope_scaling``. The versions prefer different forms and ignore the others, so forms that disagree are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError

DEFAULT_THETA = 10000.0
"""The default of transformers for every family here."""
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
KEYS = {"default": (), "llama3": LLAMA3}
"""The fields that each rope_type uses, in addition to the common ones."""
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
OBJECTS = ("rope_parameters", "rope_scaling")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's rescaling of low rotary frequencies (transformers/modeling_rope_utils.py, "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    scaling: RopeScaling | None


def read_rope(config: Mapping[str, Any], supported: tuple[str, ...], path: Path) -> Rope:
    """Read the rotary settings; ``supported`` are the family's values of ``rope_type``.

    Raises:
        UserError: Fields disagree, or would change the result and are not supported.
    """
    found = {name: _rope_object(config, name, supported, path) for name in OBJECTS if config.get(name) is not None}
    if len(found) == 2:
        _require_agreement(config, found, path)
    if "partial_rotary_factor" in config:
        _refuse_partial_rotary("partial_rotary_factor", config["partial_rotary_factor"], path)
    theta = _theta(config, found, path)
    rope: Mapping[str, Any] = next(iter(found.values()), {})
    if _type(rope) != "llama3":
        return Rope(theta, None)
    length, top_level = rope["original_max_position_embeddings"], config.get("original_max_position_embeddings")
    if top_level is not None and top_level != length:
        raise UserError(
            f"{path}: original_max_position_embeddings ({top_level}) and that of {next(iter(found))} ({length}) "
            "disagree; keep the one that the model was trained with"
        )
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(length),
    )
    return Rope(theta, scaling)


def _rope_object(config: Mapping[str, Any], name: str, supported: tuple[str, ...], path: Path) -> Mapping[str, Any]:
    rope = config[name]
    if not isinstance(rope, dict):
        raise UserError(f"{path}: {name} ({rope}) must be an object")
    if nested := sorted(key for key, value in rope.items() if isinstance(value, dict)):
        raise UserError(
            f"{path}: {name} has separate fields for {', '.join(nested)}; only one set for all layers is supported"
        )
    kind = _type(rope)
    if "rope_type" in rope and rope.get("type", kind) != kind:
        raise UserError(f"{path}: {name}.rope_type ({kind}) and {name}.type ({rope['type']}) disagree; keep one")
    if kind not in supported:
        raise UserError(f"{path}: {name} ({rope}) is not supported; use a model without it")
    _refuse_partial_rotary(f"{name}.partial_rotary_factor", rope.get("partial_rotary_factor"), path)
    unknown = sorted(key for key in rope.keys() - {*COMMON, *KEYS[kind]} if rope[key] is not None)
    if unknown:
        raise UserError(
            f"{path}: {name}.{unknown[0]} ({rope[unknown[0]]}) has no effect with rope_type {kind}; remove it, or use "
            "a model without it"
        )
    for key in KEYS[kind]:
        if rope.get(key) is None:
            raise UserError(f"{path}: {name}.{key} is missing, which rope_type {kind} needs")
        _require_number(f"{name}.{key}", rope[key], path)
    return rope


def _require_agreement(config: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    def content(rope: Mapping[str, Any]) -> dict[str, Any]:
        theta = rope.get("rope_theta")
        return {
            "rope_type": _type(rope),
            "rope_theta": config.get("rope_theta") if theta is None else theta,
            **{key: rope[key] for key in KEYS[_type(rope)]},
        }

    new, old = (content(found[name]) for name in OBJECTS)
    # rope_scaling never held the base frequency before transformers 5.
    if old["rope_theta"] is None:
        old["rope_theta"] = new["rope_theta"]
    if new != old:
        raise UserError(
            f"{path}: rope_parameters ({dict(found['rope_parameters'])}) and rope_scaling "
            f"({dict(found['rope_scaling'])}) disagree; keep the one that the model was trained with"
        )


def _theta(config: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], path: Path) -> float:
    named = {f"{name}.rope_theta": rope.get("rope_theta") for name, rope in found.items()}
    named["rope_theta"] = config.get("rope_theta")
    given = {name: value for name, value in named.items() if value is not None}
    for name, value in given.items():
        _require_number(name, value, path)
    if len(set(given.values())) > 1:
        shown = " and ".join(f"{name} ({value})" for name, value in given.items())
        raise UserError(f"{path}: {shown} disagree; keep the one that the model was trained with")
    if "rope_parameters" in found and not given:
        raise UserError(f"{path}: rope_parameters.rope_theta is missing; set it to what the model was trained with")
    return float(next(iter(given.values()), DEFAULT_THETA))


def _require_number(name: str, value: Any, path: Path) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{path}: {name} ({value}) must be a positive number")


def _refuse_partial_rotary(name: str, value: Any, path: Path) -> None:
    if value is not None and value != 1:
        raise UserError(f"{path}: {name} ({value}) is not supported; use a model without it")


def _type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
