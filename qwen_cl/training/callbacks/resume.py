"""What a run that goes on from a checkpoint needs, of Lightning and NeMo, to go on as its config says."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from qwen_cl.patches.registry import replace
from qwen_cl.training.callbacks.base import RunCallback


class LrScheduleFromConfig(RunCallback):
    """A run that goes on keeps its place in the schedule and takes the schedule itself from its config: with
    ``resume.allow_changes`` the learning rate, or the number of steps, may be another one. Its checkpoint has all of
    the old one, in the scheduler's state and in the optimizer's."""

    def on_first_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module: Any = pl_module.optim
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            groups = scheduler.optimizer.param_groups
            unused = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": module.config.lr} for _ in groups]
            said = module.lr_scheduler.scheduler(pl_module, torch.optim.SGD(unused))["lr_scheduler"]["scheduler"]
            kept = {name: getattr(scheduler, name) for name in ("optimizer", "last_epoch", "_step_count")}
            scheduler.__dict__.update({**vars(said), **kept})
            for group, rate in zip(groups, scheduler.get_lr()):
                group["lr"] = rate


class RunEndHooksOnResume(RunCallback):
    """A run that was killed after its last step was saved has no step left. Lightning would leave out what comes at the
    end of training: the samples, the adapter."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        replace(trainer.fit_loop, "skip", False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step >= trainer.max_steps and self.context.adapter is not None:
            self.context.adapter.on_train_epoch_start(trainer, pl_module)  # the first epoch, which would make it
