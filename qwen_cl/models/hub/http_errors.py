"""The errors of the HTTP library under huggingface_hub: requests before 1.0, httpx in 1.x, httpx2 in 2.x."""

from __future__ import annotations

import sys
from typing import Any

FAMILIES = {
    "requests": ("RequestException",),
    "httpx": ("HTTPError", "InvalidURL", "StreamError"),
    "httpx2": ("HTTPError", "InvalidURL", "StreamError"),
}
"""Base classes of everything that each library raises."""
COMMON_NAMES = {
    "ConnectError": "ConnectionError",
    "NetworkError": "ConnectionError",
    "RemoteProtocolError": "ConnectionError",
    "ReadError": "ConnectionError",
    "WriteError": "ConnectionError",
    "CloseError": "ConnectionError",
}
"""httpx's names for what requests calls a ConnectionError: a message must not depend on the library."""


def request_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the exceptions of a huggingface_hub request, its own HTTP errors included, and the others.

    Only libraries that are imported are included, as no other can have raised anything.
    """
    families = [(sys.modules[library], names) for library, names in FAMILIES.items() if library in sys.modules]
    bases: list[type[Exception]] = [getattr(module, name) for module, names in families for name in names]
    return (*bases, *others)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the response; None if there was none."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    return status


def reason_of(error: BaseException) -> str:
    """Return the kind of an error in one or two words, as its text may hold signed URLs."""
    status = status_of(error)
    name = type(error).__name__
    return COMMON_NAMES.get(name, name) if status is None else f"HTTP {status}"
