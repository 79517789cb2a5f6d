"""Importing megatron-core without what its import does for inference."""

from __future__ import annotations

from typing import Any


def import_megatron() -> None:
    """Before anything else of Megatron or NeMo is imported; idempotent.

    ``megatron/core/inference/unified_memory.py`` compiles a CUDA library on import, for inference. That takes half a
    minute where there is an nvcc, and where there is one and no GPU it ends in an IndexError. Training never uses it.
    """
    import warnings

    from torch.utils import cpp_extension

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("not compiled: training does not use it")

    stock = cpp_extension.load_inline
    cpp_extension.load_inline = refuse
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import megatron.core.inference.unified_memory  # noqa: F401
    finally:
        cpp_extension.load_inline = stock
