"""Make Lightning and NeMo resume from a checkpoint as the config says."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from qwen_cl.patches.registry import replace
from qwen_cl.training.callbacks.base import RunCallback


class LrScheduleFromConfig(RunCallback):
    """The learning rate schedule of the config, at the step of the checkpoint.

    With ``resume.allow_changes`` the learning rate or the number of steps may differ from those of the checkpoint,
    which has the earlier schedule in the state of both the scheduler and the optimizer.
    """

    def on_first_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module: Any = pl_module.optim
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            groups = scheduler.optimizer.param_groups
            unused = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": module.config.lr} for _ in groups]
            configured = module.lr_scheduler.scheduler(pl_module, torch.optim.SGD(unused))["lr_scheduler"]["scheduler"]
            retained = {name: getattr(scheduler, name) for name in ("optimizer", "last_epoch", "_step_count")}
            scheduler.__dict__.update({**vars(configured), **retained})
            for group, rate in zip(groups, scheduler.get_lr()):
                group["lr"] = rate


class RunEndHooksOnResume(RunCallback):
    """The hooks of the end of training for a run that was killed after its last checkpoint and has no step left.

    Lightning would skip them, and with them the samples and the adapter.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        replace(trainer.fit_loop, "skip", False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step >= trainer.max_steps and self.context.adapter is not None:
            self.context.adapter.on_train_epoch_start(trainer, pl_module)  # normally called at the first epoch
