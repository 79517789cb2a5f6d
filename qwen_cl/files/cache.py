"""The location of the cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """Return the absolute path of ``$QWEN_CL_CACHE``, or of the default cache; it need not exist."""
    home = os.environ.get("QWEN_CL_CACHE") or "~/.cache/qwen_cl"
    return Path(os.path.expanduser(home)).absolute()  # noqa: PTH111 - Path's raises on an unknown user
