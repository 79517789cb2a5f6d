"""Bounds of single values, with the message that names them."""

from __future__ import annotations

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
