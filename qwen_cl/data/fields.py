"""The fields of rows under the names they have here. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from qwen_cl.config.errors import UserError


def missing_field(
    found: Iterable[str], field: str, where: str, fix: str = "rename it, or set data.text_field"
) -> UserError:
    names = ", ".join(map(repr, found)) or "none"
    return UserError(f"{where}: field {field!r} is missing (found: {names}); {fix}")
