"""Seed the random number generators of a run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.utils import get_model_config

from qwen_cl.training.callbacks.base import RunCallback
from qwen_cl.training.model.adapter_init import draw_from


class Seed(RunCallback):
    """What comes after the weights, adapters and dropout, is drawn from the run's seed; NeMo's own is fixed at 1234.

    And from the step, so that a run that goes on draws what it would have drawn, with no generator's state to keep.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._draws = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        draw_from(self.seed)
        pl.seed_everything(self.seed + 100 * parallel_state.get_pipeline_model_parallel_rank(), verbose=False)
        tensor_parallel.model_parallel_cuda_manual_seed(self.seed)

    def on_first_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draws = _draws(trainer.strategy.megatron_parallel)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, index)
        if not self._draws:
            return
        key = (self.seed, trainer.global_step, parallel_state.get_data_parallel_rank())
        seed = int(np.random.default_rng(key).integers(2**30))  # Megatron adds its ranks to it
        torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _draws(model: Any) -> bool:
    """Whether a step draws anything: without dropout, to seed every generator is time in which a GPU waits."""
    config = get_model_config(model[0])
    kept = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    return kept or config.hidden_dropout > 0 or config.attention_dropout > 0
