"""The base of a run's callbacks: the objects of their process, and hooks of the first batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

if TYPE_CHECKING:
    from qwen_cl.reporting.tracking.connection import WandbLogger
    from qwen_cl.training.callbacks.metrics import RunRecorder
    from qwen_cl.training.stop import StopRequest


@dataclass(slots=True, kw_only=True)
class RunContext:
    """The objects of one process that its callbacks use. A recipe cannot contain them, because it is data."""

    stop: StopRequest | None = None
    wandb_logger: WandbLogger | None = None
    """The W&B logger, on rank 0 if W&B is enabled."""
    adapter: Any = None
    """NeMo's PEFT transform; None in full fine-tuning."""
    recorder: RunRecorder | None = None
    """Set when the recorder is bound."""


class Bound:
    """A callback that is given the context of its process before training."""

    context = RunContext()

    def bind(self, context: RunContext) -> None:
        self.context = context


class RunCallback(Bound, pl.Callback):
    """A callback of a run."""

    _started = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Call the hooks below once.

        Not earlier: with an adapter, NeMo has only just changed the model, and created or loaded the optimizer's state.
        """
        if self._started:
            return
        self._started = True
        self.on_first_batch(trainer, pl_module)
        if trainer.global_step == 0:
            self.on_step_zero(trainer, pl_module)

    def on_first_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act before the first batch of this process."""

    def on_step_zero(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act before the first batch of the run, but not of a resumed run."""


def build_bound(recipe: Any, context: RunContext) -> Any:
    """Build a recipe and bind its callbacks to the context. Returns the function that runs it."""
    import fiddle

    task = fiddle.build(recipe)
    context.adapter = task.keywords.get("peft")
    for callback in (*task.keywords["trainer"].callbacks, task.keywords["log"].ckpt):
        if isinstance(callback, Bound):  # Lightning adds callbacks of its own
            callback.bind(context)
    return task
