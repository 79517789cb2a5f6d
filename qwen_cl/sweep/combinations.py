"""The combinations of swept values; each is a trial."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qwen_cl.config.errors import UserError
from qwen_cl.config.overrides import override_key
from qwen_cl.config.store import GROUPS

CHOOSERS = (*GROUPS, "experiment")
Combination = tuple[str, ...]
"""Overrides as on the command line."""


def combinations(overrides: Sequence[Override]) -> list[Combination]:
    """Return the Cartesian product of the values of all keys.

    Raises:
        UserError: an override is an interval, which has no list of values.
    """
    columns: dict[str, list[str]] = {}
    for override in overrides:
        if override.is_interval_sweep():
            raise UserError(
                f"{override.input_line} is an interval, which hydra/sweeper=grid cannot enumerate; write a,b,c or "
                "range(a,b), or search it with hydra/sweeper=optuna"
            )
        key = override.get_key_element()
        if override.is_discrete_sweep():
            columns[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            columns[key] = [str(override.input_line)]
    return list(itertools.product(*columns.values()))


def applicable(
    found: Sequence[Sequence[str]], compose: Callable[[Sequence[str]], DictConfig]
) -> tuple[list[Combination], list[str]]:
    """Drop the overrides of keys that a combination's choice of a swept group does not have.

    Combinations that become equal are one trial. A key that no choice has stays, and is refused at composition.
    Also return a note per dropped key.
    """
    swept = {key for key in differing(found) if key in CHOOSERS}
    composed = functools.cache(compose)
    existing = [_existing_keys(combination, composed) if swept else _dotted(combination) for combination in found]
    known = set().union(*existing)
    retained: dict[Combination, None] = {}
    notes: dict[str, None] = {}
    for combination, keys in zip(found, existing):
        lacking = (known & _dotted(combination)) - keys
        retained[tuple(text for text in combination if override_key(text) not in lacking)] = None
        choices = " ".join(text for text in combination if override_key(text) in swept)
        notes |= dict.fromkeys(f"{key} is dropped for {choices}, which has no such key" for key in sorted(lacking))
    return list(retained), list(notes)


def differing(found: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys whose values differ between the combinations, in the order of the overrides."""
    values: dict[str, set[str | None]] = {override_key(text): set() for combination in found for text in combination}
    for combination in found:
        by_key = {override_key(text): text for text in combination}
        for key in values:
            values[key].add(by_key.get(key))
    return [key for key, texts in values.items() if len(texts) > 1]


def _dotted(combination: Iterable[str]) -> set[str]:
    return {key for key in map(override_key, combination) if "." in key}


def _existing_keys(combination: Sequence[str], compose: Callable[[Combination], DictConfig]) -> set[str]:
    base = compose(tuple(text for text in combination if override_key(text) in CHOOSERS))
    return {key for key in _dotted(combination) if _has(base, key)}


def _has(config: DictConfig, key: str) -> bool:
    owner, _, name = key.rpartition(".")
    node = OmegaConf.select(config, owner)
    return isinstance(node, DictConfig) and node._get_node(name, validate_access=False) is not None
