"""Checks of config values."""

from __future__ import annotations

import re

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
    """Return the seconds of a duration ``[D-]HH:MM:SS``. Raises UserError if it is not one."""
    match = DURATION.fullmatch(duration)
    if match is None or not any(map(int, match.groups(default="0"))):
        raise UserError(f"{key} ({duration}) must read [D-]HH:MM:SS and be above 0, like 01:30:00 or 2-12:00:00")
    days, hours, minutes, seconds = map(int, match.groups(default="0"))
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
