"""Tells the parent of the ranks that this one gets on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from qwen_cl.launch import heartbeat


class HeartbeatCallback(pl.Callback):
    """Steps while they are made; before and after them, whatever the process does is progress."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        heartbeat.start_step_tracking()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        heartbeat.progress()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        heartbeat.end_steps()
