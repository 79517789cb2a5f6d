"""Import megatron-core and NeMo without side effects and dependencies that training does not need."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

from qwen_cl.patches.registry import replace


def import_megatron() -> None:
    """Import Megatron. Called before any other import of Megatron or NeMo; repeating a call has no effect."""
    _restore_product()
    _skip_lepton()
    _skip_inference_library()


def _restore_product() -> None:
    """Restore ``numpy.product``, which numpy 2 removed and megatron/core/dist_checkpointing calls.

    Without it, runs on several GPUs would train until their first checkpoint, and fail there.
    """
    import numpy

    if not hasattr(numpy, "product"):
        replace(numpy, "product", numpy.prod)


def _skip_inference_library() -> None:
    """Skip the CUDA library that ``megatron/core/inference/unified_memory.py`` compiles on import.

    It takes half a minute with nvcc, and fails with an IndexError without a GPU. Training never uses it.
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
    """Skip the client of a cloud service that ``nemo_run/core/execution/lepton.py`` imports, with a web server.

    A training process submits nothing.
    """
    if "leptonai" not in sys.modules and not any(isinstance(finder, _Unused) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Unused())


class _Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The importer of placeholders for leptonai's modules, which have every name."""

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
    """A placeholder class: it can be named, but not used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"{cls.__module__} is not imported in a process that trains")
