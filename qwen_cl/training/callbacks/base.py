"""What the callbacks of a run have in common: the objects of their process, and the first batch."""

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
    """The objects of one process that its callbacks work with. A recipe cannot name them: it is data."""

    stop: StopRequest | None = None
    wandb_logger: WandbLogger | None = None
    """W&B, on rank 0 of a run that has it."""
    adapter: Any = None
    """NeMo's PEFT, which makes the adapters; None in full fine-tuning."""
    recorder: RunRecorder | None = None
    """Comes with the recorder, when it is bound."""


class Bound:
    """What is handed the context of its process before training."""

    context = RunContext()

    def bind(self, context: RunContext) -> None:
        self.context = context


class RunCallback(Bound, pl.Callback):
    """A callback of a run."""

    _started = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Call the hooks below, once. Not earlier: with an adapter, NeMo has only just changed the model, and made or
        loaded the optimizer's state."""
        if self._started:
            return
        self._started = True
        self.on_first_batch(trainer, pl_module)
        if trainer.global_step == 0:
            self.on_step_zero(trainer, pl_module)

    def on_first_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act before the first batch of this process."""

    def on_step_zero(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act before the first batch of the run: a resumed run does not."""


def build_bound(recipe: Any, context: RunContext) -> Any:
    """Build a recipe, and hand its callbacks the context. Returns what runs it when it is called."""
    import fiddle

    task = fiddle.build(recipe)
    context.adapter = task.keywords.get("peft")
    for callback in (*task.keywords["trainer"].callbacks, task.keywords["log"].ckpt):
        if isinstance(callback, Bound):  # Lightning has added some of its own
            callback.bind(context)
    return task
