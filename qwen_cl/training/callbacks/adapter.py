"""Save the adapter at the end of training."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from qwen_cl.data.chat.stop_tokens import end_of_turn_tokens
from qwen_cl.models.adapter_methods import Adapter
from qwen_cl.models.export.adapter import save_adapter
from qwen_cl.runs.folder import RunFolder


class SaveAdapter(pl.Callback):
    """The export of the trained adapter in PEFT's format when training ends."""

    def __init__(
        self,
        *,
        directory: str,
        source: str,
        base_adapter: str | None,
        adapter: Adapter,
        on_answers: bool,
    ) -> None:
        self.directory = Path(directory)
        self.source, self.base_adapter, self.adapter = source, base_adapter, adapter
        self.on_answers = on_answers
        """The run trains on assistant turns, and so learns where they end."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > 0:
            model = trainer.strategy.megatron_parallel
            stops = end_of_turn_tokens(trainer.datamodule.tokenizer.tokenizer) if self.on_answers else []
            small_files = RunFolder(self.directory.parent).model_files
            save_adapter(model, self.adapter, self.source, self.directory, small_files, stops, self.base_adapter)
