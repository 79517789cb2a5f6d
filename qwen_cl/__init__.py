"""Adapt an open LLM to a new language with NVIDIA NeMo 2.0, straight from Hugging Face."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """``from qwen_cl import from_hugging_face``, which needs NeMo; the package itself does not."""
    if name == "from_hugging_face":
        from qwen_cl.hugging_face import from_hugging_face

        return from_hugging_face
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
