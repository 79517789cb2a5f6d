"""Bounds of single values, with the message that names them, and keys that a task does not look at."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_cl.config.errors import UserError


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
