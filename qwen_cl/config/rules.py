"""Bounds of single values, with the message that names them, and keys that a task does not look at."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_cl.config.errors import UserError

DURATION = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")


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


def seconds_of(key: str, duration: str) -> float:
    """Of ``[D-]HH:MM:SS``; raises UserError where it is none."""
    match = DURATION.fullmatch(duration)
    if match is None or not any(map(int, match.groups(default="0"))):
        raise UserError(f"{key} ({duration}) must read [D-]HH:MM:SS and be above 0, like 01:30:00 or 2-12:00:00")
    days, hours, minutes, seconds = map(int, match.groups(default="0"))
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


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


def quoted(value: str) -> str:
    """As Hydra's grammar takes any text. It has no escape but for the quote, and backslashes only before one."""
    body, backslashes = value.rstrip("\\"), len(value) - len(value.rstrip("\\"))
    inner = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", body)
    return f"'{inner}{chr(92) * 2 * backslashes}'"
