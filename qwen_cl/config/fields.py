"""The metadata of config fields: what depends on a key, and which commands take it.

A field without :func:`setting` is one that the result depends on, of a run alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Any


class Affects(Enum):
    """The part of a run that depends on a key, which decides whether it may change on resume."""

    nothing = "nothing"
    """Two runs that differ in it are the same run: it may change."""
    execution = "execution"
    """How the run is carried out, to the same result: it may change. A checkpoint fits every parallelism, and each
    token weighs the same in every micro batch."""
    result = "result"
    """It may change only where ``resume.allow_changes`` names it."""
    checkpoint = "checkpoint"
    """What the checkpoints hold, which fit nothing else: it never may change."""


class Scope(Enum):
    """The commands that take a key, beside the one that starts the run."""

    run = "run"
    """None: a command on a finished run takes what the run had."""
    command = "command"
    """Not even the runs that the command itself starts: they have their own."""
    access = "access"
    """Commands on a finished run: how the model's files are reached now."""
    inference = "inference"
    """task=generate and task=evaluate: what they compute in."""
    rendering = "rendering"
    """Those two, of a model that no run of ours trained: how conversations are rendered."""


def setting(affects: Affects = Affects.result, *, scope: Scope = Scope.run) -> Mapping[Any, Any]:
    """Return the metadata of a field: ``field(metadata=setting(Affects.nothing))``."""
    return MappingProxyType({Affects: affects, Scope: scope})


def affects(key: str) -> Affects:
    """Return what depends on a key; of an unknown one, the result.

    ``GROUP.type`` is which choice of the group it is, and what is below a mapping belongs to the mapping's key.
    """
    group, _, name = key.partition(".")
    of = key_fields().get(group if name == "type" else f"{group}.{name.partition('.')[0]}" if name else group)
    return Affects.result if of is None else of.metadata.get(Affects, Affects.result)


def keys_of(*scopes: Scope) -> tuple[str, ...]:
    """Return the keys with one of these scopes, in the order of their fields."""
    return tuple(key for key, of in key_fields().items() if of.metadata.get(Scope, Scope.run) in scopes)


@cache
def key_fields() -> Mapping[str, Field[Any]]:
    """Return the field of every key that some choice has, and of every group."""
    return dict(_walk())


def _walk() -> Iterator[tuple[str, Field[Any]]]:
    from qwen_cl.config import run, wandb
    from qwen_cl.config.store import GROUPS

    owners: list[tuple[str, type]] = [("", run.RunConfig), ("wandb.", wandb.WandbConfig)]
    owners += [(f"{group}.", kind) for group, kinds in GROUPS.items() for kind in kinds.values()]
    for prefix, owner in owners:
        yield from ((f"{prefix}{field.name}", field) for field in fields(owner))
