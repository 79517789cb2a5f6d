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

from qwen_cl.megatron import optimizer_state
from qwen_cl.megatron.writers import hold_what_is_staged


def install(*, cpu: bool) -> None:
    """Idempotent.

    Megatron spawns a manager for what its writers report, which imports torch again: three seconds of a laptop's first
    checkpoint.
    """
    hold_what_is_staged()
    optimizer_state.install()
    filesystem_async._get_write_results_queue = Report  # one for each save of each rank
    if not distrib_optimizer.HAVE_APEX_OR_TE and not hasattr(DistributedOptimizer, "_resumes_torch_adam"):
        _resume_torch_adam()
    if cpu:
        from nemo.lightning.io import pl

        pl._fix_tensors_device = lambda checkpoint: checkpoint  # NeMo moves what it loaded to the GPU it is on


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
    stock_state, stock_load = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    stock_set = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict(self: DistributedOptimizer) -> dict[str, Any]:
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.zeros(())
        return stock_state(self)

    def set_tensors(self: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[parameter]
        main = self.optimizer.param_groups[group]["params"][order]
        stock_set(self, parameter, {"step": self.optimizer.state[main]["step"], **tensors})

    def load_state_dict(self: DistributedOptimizer, state: dict[str, Any]) -> None:
        stock_load(self, state)
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()

    DistributedOptimizer._resumes_torch_adam = True
    DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict = state_dict, load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_tensors
