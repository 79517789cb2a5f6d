"""The names that this package has replaced in modules and classes of others; leptonai is entirely ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any


def patched_names() -> list[str]:
    return sorted({f"{owner}{name}" for owner, names in _owners() for name, value in names.items() if _is_ours(value)})


def _owners() -> Iterator[tuple[str, dict[str, Any]]]:
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.partition(".")[0] in ("", "qwen_cl", "tests", "__main__", "__mp_main__", "leptonai"):
            continue
        yield f"{name}:", dict(vars(module))
        for value in list(vars(module).values()):
            if issubclass(type(value), type) and value.__module__ == name:
                yield f"{name}:{value.__qualname__}.", dict(vars(value))


def _is_ours(value: Any) -> bool:
    """Return whether a value is ours, without calling it, as some are stand-ins that raise."""
    kind = type(value)
    if issubclass(kind, staticmethod | classmethod | MethodType):
        value = value.__func__
    elif issubclass(kind, property):
        value = value.fget
    if issubclass(type(value), FunctionType):
        home = value.__globals__.get("__name__")  # functools.wraps copies __module__
    else:
        home = (value if issubclass(type(value), type) else type(value)).__module__
    return str(home).partition(".")[0] == "qwen_cl"
