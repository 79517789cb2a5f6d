"""From what was typed to the combinations that are trials."""

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
    """The product of all values that are given. Raises UserError where there is no end of them."""
    columns: dict[str, list[str]] = {}
    for override in overrides:
        if override.is_interval_sweep():
            raise UserError(
                f"{override.input_line} has no end of values, for hydra/sweeper=grid; write a,b,c or range(a,b), or "
                "search it with hydra/sweeper=optuna"
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
    """Where a group is swept, some choices may lack a key that others have: there it is left out, and what comes out
    equal is one trial. A key that none has stays, for the composition to refuse. Also says what was left out where.
    """
    swept = {key for key in differing(found) if key in CHOOSERS}
    composed = functools.cache(compose)
    has = [_keys_there(combination, composed) if swept else _dotted(combination) for combination in found]
    known = set().union(*has)
    kept: dict[Combination, None] = {}
    left_out: dict[str, None] = {}
    for combination, there in zip(found, has):
        lacking = (known & _dotted(combination)) - there
        kept[tuple(text for text in combination if override_key(text) not in lacking)] = None
        choices = " ".join(text for text in combination if override_key(text) in swept)
        left_out |= dict.fromkeys(f"{key} is left out where {choices}, which has none" for key in sorted(lacking))
    return list(kept), list(left_out)


def differing(found: Sequence[Sequence[str]]) -> list[str]:
    """The keys that tell the combinations apart, in the order they were given."""
    values: dict[str, set[str | None]] = {override_key(text): set() for combination in found for text in combination}
    for combination in found:
        said = {override_key(text): text for text in combination}
        for key in values:
            values[key].add(said.get(key))
    return [key for key, texts in values.items() if len(texts) > 1]


def _dotted(combination: Iterable[str]) -> set[str]:
    return {key for key in map(override_key, combination) if "." in key}


def _keys_there(combination: Sequence[str], compose: Callable[[Combination], DictConfig]) -> set[str]:
    base = compose(tuple(text for text in combination if override_key(text) in CHOOSERS))
    return {key for key in _dotted(combination) if _has(base, key)}


def _has(config: DictConfig, key: str) -> bool:
    owner, _, name = key.rpartition(".")
    node = OmegaConf.select(config, owner)
    return isinstance(node, DictConfig) and node._get_node(name, validate_access=False) is not None
