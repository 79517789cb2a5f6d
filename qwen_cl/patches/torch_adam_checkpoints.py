"""Save checkpoints without a manager process, and resume torch's Adam without Transformer Engine or a GPU."""

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
from qwen_cl.patches.async_writers import retain_staged_tensors
from qwen_cl.patches.registry import replace

_stock_state_dict = DistributedOptimizer.state_dict
_stock_load_state_dict = DistributedOptimizer.load_state_dict
_stock_set_tensors = DistributedOptimizer._set_main_param_and_optimizer_states


def install(*, cpu: bool) -> None:
    """Replace how the optimizer's state is saved and loaded.

    Megatron spawns a manager process for the results of its writers, which imports torch again: three seconds of the
    first checkpoint.
    """
    retain_staged_tensors()
    optimizer_state.install()
    replace(filesystem_async, "_get_write_results_queue", WriteResult)  # one for each save of each rank
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _resume_torch_adam()
    if cpu:
        from nemo.lightning.io import pl

        replace(pl, "_fix_tensors_device", lambda checkpoint: checkpoint)  # NeMo moves it to the GPU it is on


class WriteResult:
    """A queue for one object of any size, which a forked process puts in without waiting for its parent."""

    def __init__(self) -> None:
        self.file = open(os.memfd_create("report"), "w+b")  # noqa: SIM115  closed with this object

    def put(self, result: Any) -> None:
        try:
            text = pickle.dumps(result)
            pickle.loads(text)
        except Exception:  # an exception that cannot be unpickled
            text = pickle.dumps(RuntimeError(str(result)))
        self.file.write(text)
        self.file.flush()

    def get_nowait(self) -> Any:
        """Return the object.

        Raises:
            queue.Empty: there is none.
        """
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except Exception:  # nothing, or an incomplete object
            raise queue.Empty from None


def _resume_torch_adam() -> None:
    """Fix three faults of megatron-core 0.15 with torch's Adam, which has a step tensor per parameter.

    It reads the step of a state that does not exist yet; on loading, it expects a step beside the moments, which it did
    not save; and it gives every parameter the same tensor, which Adam then increments once per parameter.
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
