"""Checkpoints without a server process to save them, and, to resume from them, without Transformer Engine or a GPU."""

from __future__ import annotations

import os
import pickle
import queue
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from qwen_cl.patches import optimizer_state
from qwen_cl.patches.async_writers import hold_what_is_staged
from qwen_cl.patches.registry import replace

_stock_state_dict = DistributedOptimizer.state_dict
_stock_load_state_dict = DistributedOptimizer.load_state_dict
_stock_set_tensors = DistributedOptimizer._set_main_param_and_optimizer_states


def install(*, cpu: bool) -> None:
    """Replace what saves and loads a checkpoint's optimizer.

    Megatron spawns a manager for what its writers report, which imports torch again: three seconds of a laptop's first
    checkpoint.
    """
    hold_what_is_staged()
    optimizer_state.install()
    replace(filesystem_async, "_get_write_results_queue", Report)  # one for each save of each rank
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _resume_torch_adam()
    if cpu:
        from nemo.lightning.io import pl

        replace(pl, "_fix_tensors_device", lambda checkpoint: checkpoint)  # NeMo moves it to the GPU it is on


class Report:
    """One object that a forked process leaves for its parent, of any size, whether or not the parent is waiting."""

    def __init__(self) -> None:
        self.file = open(os.memfd_create("report"), "w+b")  # noqa: SIM115  as long as this object

    def put(self, report: Any) -> None:
        try:
            text = pickle.dumps(report)
            pickle.loads(text)
        except Exception:  # an exception whose class cannot be made again
            text = pickle.dumps(RuntimeError(str(report)))
        self.file.write(text)
        self.file.flush()

    def get_nowait(self) -> Any:
        """Raises queue.Empty where none was left."""
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except Exception:  # nothing, or the half of it
            raise queue.Empty from None


def _resume_torch_adam() -> None:
    """Torch's Adam counts the steps of each parameter in a tensor, which megatron-core 0.15 gets wrong three times.

    It asks a new optimizer for the step of a state that is not made yet; when it loads, it looks for a step beside the
    moments, where it saved none; and it gives every parameter the same tensor, which Adam then counts up once for each.
    """
    replace(DistributedOptimizer, "state_dict", _state_dict)
    replace(DistributedOptimizer, "load_state_dict", _load_state_dict)
    replace(DistributedOptimizer, "_set_main_param_and_optimizer_states", _set_tensors)


def _state_dict(self: DistributedOptimizer) -> dict[str, Any]:
    if not self.optimizer.state:
        self.init_state_fn(self.optimizer, self.config)
        for state in self.optimizer.state.values():
            state["step"] = torch.zeros(())
    return _stock_state_dict(self)


def _load_state_dict(self: DistributedOptimizer, state: dict[str, Any]) -> None:
    _stock_load_state_dict(self, state)
    for parameter_state in self.optimizer.state.values():
        parameter_state["step"] = parameter_state["step"].clone()


def _set_tensors(self: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
    group, order = self.model_param_group_index_map[parameter]
    main = self.optimizer.param_groups[group]["params"][order]
    _stock_set_tensors(self, parameter, {"step": self.optimizer.state[main]["step"], **tensors})
