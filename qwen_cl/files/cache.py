"""Where everything is kept that is worth making only once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """``$QWEN_CL_CACHE``, or what stands for it; absolute, and perhaps not there yet."""
    home = os.environ.get("QWEN_CL_CACHE") or "~/.cache/qwen_cl"
    return Path(os.path.expanduser(home)).absolute()  # noqa: PTH111 - Path's raises on an unknown user
