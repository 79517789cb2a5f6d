"""Mask the padding of the vocabulary."""

from __future__ import annotations

import lightning.pytorch as pl

from qwen_cl.training.model.loss import mask_padded_vocabulary


class MaskPaddedVocabulary(pl.Callback):
    """The mask of the padded vocabulary: see :func:`qwen_cl.training.model.loss.mask_padded_vocabulary`."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        mask_padded_vocabulary(trainer.strategy.megatron_parallel, self.vocab_size)
