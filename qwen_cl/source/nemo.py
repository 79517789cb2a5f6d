"""Makes ``nl.RestoreConfig(path="hf://ORG/NAME@COMMIT")`` work in an ordinary NeMo 2.0 recipe.

NeMo 2.2 to 2.7 only pretend: ``AutoResume._extract_path`` asserts on anything but ``nemo://``. Three methods are
replaced for paths in Hugging Face layout and left alone for all others. They are replaced on the classes because
``PEFT.setup`` throws away a checkpoint IO handed to the strategy, and so that the recipe stays stock.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from nemo.lightning.pytorch.callbacks.peft import WrappedAdapterIO
from nemo.lightning.pytorch.strategies import MegatronStrategy
from nemo.lightning.resume import AutoResume

from qwen_cl.source.architecture import read_architecture
from qwen_cl.source.checkpoint import Checkpoint
from qwen_cl.source.reference import is_hub_reference, local_directory, read_model_config
from qwen_cl.source.shards import fill

logger = logging.getLogger(__name__)


def install() -> None:
    """Idempotent."""
    if getattr(AutoResume, "_reads_hugging_face", False):
        return
    AutoResume._reads_hugging_face = True
    stock_extract, stock_load = AutoResume._extract_path, MegatronStrategy.load_checkpoint
    stock_load_model = MegatronStrategy.load_model_state_dict

    def _extract_path(self: AutoResume, path: str) -> Any:
        return path if is_hub_reference(str(path)) else stock_extract(self, path)

    def load_checkpoint(
        self: MegatronStrategy, checkpoint_path: str | Path, selective_restore: bool = False
    ) -> dict[str, Any]:
        if not in_hugging_face_layout(checkpoint_path):
            return stock_load(self, checkpoint_path, selective_restore)
        load_hugging_face(self, str(checkpoint_path))
        return {}

    def load_model_state_dict(self: MegatronStrategy, checkpoint: dict[str, Any], strict: bool = True) -> None:
        if checkpoint:
            stock_load_model(self, checkpoint, strict)
            return
        for optimizer in self.optimizers:
            optimizer.reload_model_params()  # the fp32 masters were made before the weights came

    AutoResume._extract_path = _extract_path
    MegatronStrategy.load_checkpoint = load_checkpoint
    MegatronStrategy.load_model_state_dict = load_model_state_dict


def in_hugging_face_layout(path: str | Path) -> bool:
    return is_hub_reference(str(path)) or (Path(path) / "config.json").is_file()


def load_hugging_face(strategy: MegatronStrategy, source: str) -> None:
    """Fill the strategy's model, before any adapter exists, from a resolved source."""
    started = time.monotonic()
    directory = local_directory(source)
    architecture = read_architecture(read_model_config(directory), directory)
    checkpoint = Checkpoint(directory)
    model = strategy.megatron_parallel
    shards = fill(model.sharded_state_dict(), model.named_parameters(), checkpoint, architecture)
    if isinstance(strategy.checkpoint_io, WrappedAdapterIO):
        strategy.checkpoint_io.model_ckpt_path = source  # recorded in every adapter checkpoint
    logger.info(
        "Loaded %s: %d shards, %.1f MB read in %.2f s by rank %d",
        source,
        shards,
        checkpoint.bytes_read / 1e6,
        time.monotonic() - started,
        torch.distributed.get_rank(),
    )
