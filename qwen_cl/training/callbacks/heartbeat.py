"""Report progress to the supervisor."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from qwen_cl.launch import heartbeat


class HeartbeatCallback(pl.Callback):
    """The report of each training step. Before and after training, any activity of the process counts as progress."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        heartbeat.start_step_tracking()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        heartbeat.progress()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        heartbeat.end_steps()
