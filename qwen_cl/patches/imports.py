"""Importing megatron-core and NeMo without what their imports do, and bring in, for other uses than ours."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

from qwen_cl.patches.registry import replace


def import_megatron() -> None:
    """Before anything else of Megatron or NeMo is imported; idempotent."""
    _restore_product()
    _skip_lepton()
    _skip_inference_library()


def _restore_product() -> None:
    """megatron/core/dist_checkpointing calls ``numpy.product``, which numpy 2 has no more: where an image brings that,
    runs on several GPUs would train until their first checkpoint, and fail there."""
    import numpy

    if not hasattr(numpy, "product"):
        replace(numpy, "product", numpy.prod)


def _skip_inference_library() -> None:
    """``megatron/core/inference/unified_memory.py`` compiles a CUDA library on import, for inference. That takes half a
    minute where there is an nvcc, and where there is one and no GPU it ends in an IndexError. Training never uses it.
    """
    import warnings

    from torch.utils import cpp_extension

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("not compiled: training does not use it")

    stock = cpp_extension.load_inline
    replace(cpp_extension, "load_inline", refuse)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import megatron.core.inference.unified_memory  # noqa: F401
    finally:
        replace(cpp_extension, "load_inline", stock)


def _skip_lepton() -> None:
    """``nemo_run/core/execution/lepton.py`` imports the client of a service, and with it a web server, to name its
    classes. No cluster of ours is on it, and in a process that trains nobody submits."""
    if "leptonai" not in sys.modules and not any(isinstance(finder, _Unused) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Unused())


class _Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds leptonai's modules, which have every name and do nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] != "leptonai":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _UnusedModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _UnusedModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _UnusedType(name, (), {"__module__": self.__name__})


class _UnusedType(type):
    """A class that can be named, and whose states can, but nothing more."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"{cls.__module__} is not imported in a process that trains")
