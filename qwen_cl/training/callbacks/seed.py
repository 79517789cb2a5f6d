"""Seed the random number generators of a run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.utils import get_model_config

from qwen_cl.training.callbacks.base import RunCallback
from qwen_cl.training.model.adapter_init import set_adapter_seed


class Seed(RunCallback):
    """The random number generators of a run, seeded by its seed instead of NeMo's fixed 1234.

    They are seeded again at each step, so that a resumed run draws the same numbers without saving generator states.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._draws = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        set_adapter_seed(self.seed)
        pl.seed_everything(self.seed + 100 * parallel_state.get_pipeline_model_parallel_rank(), verbose=False)
        tensor_parallel.model_parallel_cuda_manual_seed(self.seed)

    def on_first_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draws = _draws(trainer.strategy.megatron_parallel)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, index)
        if not self._draws:
            return
        key = (self.seed, trainer.global_step, parallel_state.get_data_parallel_rank())
        seed = int(np.random.default_rng(key).integers(2**30))  # Megatron adds the rank
        torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _draws(model: Any) -> bool:
    """Return whether a step draws random numbers. Without dropout, seeding all generators would delay the GPU."""
    config = get_model_config(model[0])
    has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    return has_dropout or config.hidden_dropout > 0 or config.attention_dropout > 0
