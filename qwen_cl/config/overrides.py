"""Overrides: their keys, quoting, and the refusal of those that a task ignores."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_cl.config.errors import UserError


def refuse_ignored(overrides: Sequence[str], taken: Sequence[str], reason: str) -> None:
    """Refuse overrides that have no effect. Raises UserError.

    ``overrides`` are the user's own words; ``taken`` are keys outside the group task, or groups, that count.
    """
    for override in overrides:
        key = override_key(override)
        groups = ("task", "hydra", *taken)
        if key not in taken and key.partition(".")[0] not in groups:
            raise UserError(f"{override} has no effect: {reason}; remove it")


def override_key(override: str) -> str:
    """Return the key or group of an override: ``model.source`` of ``+model.source=x``."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def quoted(value: str) -> str:
    """Quote any text for Hydra's grammar, which escapes only quotes, and backslashes before them."""
    body, backslashes = value.rstrip("\\"), len(value) - len(value.rstrip("\\"))
    inner = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", body)
    return f"'{inner}{chr(92) * 2 * backslashes}'"
