"""Bounds of single values, with the message that names them, and keys that a task does not look at."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_cl.config.errors import UserError


def require(
    key: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    rules = (
        (at_least, value >= (at_least or 0), "at least"),
        (above, value > (above or 0), "above"),
        (at_most, value <= (at_most or 0), "at most"),
        (below, value < (below or 0), "below"),
    )
    for bound, holds, words in rules:
        if bound is not None and not holds:
            raise UserError(f"{key} ({value}) must be {words} {bound}")


def refuse_ignored(overrides: Sequence[str], taken: Sequence[str], reason: str) -> None:
    """A key that would change nothing must not look as if it did.

    ``overrides`` are the user's own words; ``taken`` are keys outside the group task, or groups, that count.
    """
    for override in overrides:
        key = override_key(override)
        groups = ("task", "hydra", *taken)
        if key not in taken and key.partition(".")[0] not in groups:
            raise UserError(f"{override} would change nothing: {reason}; remove it")


def override_key(override: str) -> str:
    """The key or group an override is of: ``model.source`` of ``+model.source=x``."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]
