"""The package qwen_cl: adapt an open LLM to a new language with NVIDIA NeMo 2.0, directly from Hugging Face."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import ``from_hugging_face`` when it is first used, as it needs NeMo and the package itself does not."""
    if name == "from_hugging_face":
        from qwen_cl.hugging_face import from_hugging_face

        return from_hugging_face
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
