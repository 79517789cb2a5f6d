"""Apply the speed optimizations of the group ``speed`` to a run's model and optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.megatron_parallel import MegatronStep

from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.callbacks.base import RunCallback
from qwen_cl.training.speed import (
    activation_recompute,
    fused_grad_accumulation,
    fused_linear_cross_entropy,
    fused_lora,
    grad_norm,
    rope_cache,
)
from qwen_cl.training.speed.compile import compile_layers
from qwen_cl.training.speed.cuda_graphs import CudaGraphSchedule


class SpeedOptimizations(RunCallback):
    """The optimizations of :class:`qwen_cl.config.speed.SpeedConfig`. Checkpoints are the same with and without.

    status.json has under ``speed_optimizations`` what is applied, and to how many modules or tensors.
    """

    def __init__(
        self,
        output_dir: str,
        *,
        compile: bool,
        fused_linear_cross_entropy: bool,
        fused_lora: bool,
        cuda_graphs: bool,
        fused_grad_accumulation: bool,
        activation_recompute: bool,
        rope_cache: bool,
        fused_adam: bool,
        foreach_grad_clip: bool,
    ) -> None:
        self.folder = RunFolder(output_dir)
        self.compile = compile
        self.fused_linear_cross_entropy = fused_linear_cross_entropy
        self.fused_lora = fused_lora
        self.cuda_graphs = cuda_graphs
        self.fused_grad_accumulation = fused_grad_accumulation
        self.activation_recompute = activation_recompute
        self.rope_cache = rope_cache
        self.fused_adam = fused_adam
        self.foreach_grad_clip = foreach_grad_clip
        self._schedule: CudaGraphSchedule | None = None

    def on_first_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = trainer.strategy.megatron_parallel
        done = {}
        if self.rope_cache:
            done["rope_cache"] = rope_cache.install(model)
        if self.fused_lora:
            done["fused_lora"] = fused_lora.fuse_lora(model)
        if self.fused_linear_cross_entropy:
            # It consists of many small operations, which on a GPU are only faster when compiled.
            compiled = self.compile or torch.cuda.is_available()
            done["fused_linear_cross_entropy"] = fused_linear_cross_entropy.install(model, compiled)
        if self.activation_recompute:
            done["activation_recompute"] = activation_recompute.install(model)
        if self.compile:
            done["compile"] = compile_layers(model)
        if self.fused_grad_accumulation:
            done["fused_grad_accumulation"] = fused_grad_accumulation.install(model)
        if self.foreach_grad_clip:
            done["foreach_grad_clip"] = grad_norm.install(model)
        optimizers = [optimizer.mcore_optimizer for optimizer in trainer.optimizers]
        done["fused_adam"] = sum(fuse_adam(optimizer, self.fused_adam) for optimizer in optimizers)
        if self.cuda_graphs:
            data = trainer.datamodule
            width, segments = (data.seq_length, 1) if data.shape is None else (data.shape.width, data.shape.segments)
            self._schedule = CudaGraphSchedule(data.micro_batch_size, width, segments)
            done["cuda_graphs"] = 1
        if trainer.is_global_zero:
            self.folder.update_status(speed_optimizations={name: count for name, count in done.items() if count})

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """Return the step for NeMo to run, with the schedule of CUDA graphs if they are enabled."""
        if self._schedule is None or step.forward_only:
            return step
        fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(MegatronStep)}
        return _ScheduledStep(**fields, schedule=self._schedule)


@dataclasses.dataclass
class _ScheduledStep(MegatronStep):
    schedule: CudaGraphSchedule | None = None

    @property
    def forward_backward_func(self) -> Any:
        return self.schedule


def fuse_adam(optimizer: Any, fused: bool) -> int:
    """Set whether torch's Adam is fused (Transformer Engine's and apex's always are), and return how many are.

    A checkpoint restores the setting of the optimizer that wrote it, and its step count where that setting needs it: on
    the parameter's device if fused, else on the CPU.
    """
    count = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        if not isinstance(adam, torch.optim.Adam):
            continue
        count += fused
        for group in adam.param_groups:
            group.update(fused=fused, foreach=False if fused else None)
            for parameter in group["params"]:
                state = adam.state.get(parameter, {})
                if "step" in state:
                    place = parameter.device if fused else torch.device("cpu")
                    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=place)
    return count
