"""Run megatron-core without a GPU.

megatron-core and NeMo name the device "cuda" in some dozen places. Mapping those to the CPU is all it takes to run the
same modules, optimizer and checkpoints there. A function mode maps the device arguments; the rest are names in
``torch.cuda`` with a plain meaning without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch._dynamo import config as compiler
from torch.overrides import TorchFunctionMode

from qwen_cl.patches.registry import replace

CPU = torch.device("cpu")


class CudaMeansCpu(TorchFunctionMode):
    """The function mode that maps the device "cuda" to the CPU, without pinned memory, in every torch call under it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizer accepts parameters by their type's name, "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.")
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_to_cpu(argument) for argument in args)
        return func(*args, **kwargs)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return CPU
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


class _Stream:
    """A stream without effect, as the work on a CPU is in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def install() -> None:
    """Enter the function mode and replace names of ``torch.cuda``. Called once per process, before NeMo is imported."""
    meanings: dict[str, Any] = {
        "current_device": lambda: CPU,
        "synchronize": lambda *args: None,
        "Stream": _Stream,
        "current_stream": lambda *args: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "LongTensor": torch.LongTensor,
        "FloatTensor": torch.FloatTensor,
    }
    for name, meaning in meanings.items():
        replace(torch.cuda, name, meaning)
    replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    # Megatron compiles its small fusions at their first call: on a CPU that needs seconds and a C++ compiler, for no
    # benefit.
    compiler.disable = True
    mode: Any = CudaMeansCpu()
    mode.__enter__()  # never exited
    _replace_rng_tracker()


def _replace_rng_tracker() -> None:
    """Replace Megatron's tracker, which saves the state of the GPU's generator, by one of the CPU's generator."""
    from megatron.core.tensor_parallel import random

    class CpuRngStatesTracker(random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            if name in self.states_:
                raise RuntimeError(f"rng state {name} already exists")
            default = torch.get_rng_state()
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(default)

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            default = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(default)

    random.initialize_rng_tracker()
    replace(random, "_CUDA_RNG_STATE_TRACKER", CpuRngStatesTracker())
    replace(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)


def without_function_mode() -> contextlib.AbstractContextManager[None]:
    """Disable the mode for code that names no device: it costs a tiny model a fifth of its time.

    Rotary embeddings do name one under context parallelism.
    """
    from megatron.core import parallel_state

    on_cpu = torch.cuda.Stream is cast(Any, _Stream)
    if not on_cpu or parallel_state.get_context_parallel_world_size() > 1:
        return contextlib.nullcontext()
    return torch._C.DisableTorchFunction()
