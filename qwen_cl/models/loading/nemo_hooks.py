"""The hooks by which ``nl.RestoreConfig(path="hf://ORG/NAME@COMMIT")`` works in a stock NeMo 2.0 recipe.

NeMo 2.2 to 2.7 declare it but do not implement it: ``AutoResume._extract_path`` accepts only ``nemo://``. Five methods
are replaced for paths in Hugging Face layout, and unchanged for all others. They are replaced on the classes because
``PEFT.setup`` discards a checkpoint IO given to the strategy, and so that the recipe stays stock.

``AutoResume.setup`` decides what to load; ``MegatronStrategy.load_checkpoint`` and ``load_model_state_dict`` load it
(on resuming an adapter first the base and, once the adapter modules exist, the adapter); ``save_checkpoint`` records
the base, which a later ``setup`` compares.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.pytorch.callbacks.peft import WrappedAdapterIO
from nemo.lightning.pytorch.strategies import MegatronStrategy
from nemo.lightning.pytorch.strategies.utils import RestoreConfig
from nemo.lightning.resume import AdapterPath, AutoResume

from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.base_record import record_base, require_same_base
from qwen_cl.models.formats.nemo_config import supported_class
from qwen_cl.models.formats.nemo_layout import WEIGHTS, is_nemo_checkpoint
from qwen_cl.models.formats.nemo_weights import check_nemo_tensors
from qwen_cl.models.formats.safetensors import Checkpoint, check_tensors
from qwen_cl.models.formats.torch_dist import DistributedWeights
from qwen_cl.models.loading.base_adapter import BaseAdapter, find_adapter
from qwen_cl.models.loading.compatibility import check_model_config
from qwen_cl.models.loading.megatron_shards import fill
from qwen_cl.models.loading.nemo_shards import fill_from_nemo
from qwen_cl.models.loading.readers import LoadProgress
from qwen_cl.models.loading.tokenizer import load_tokenizer
from qwen_cl.models.reference import ModelFiles, is_hub_reference, local_directory, read_model_config, resolve
from qwen_cl.patches.registry import replace

logger = logging.getLogger(__name__)
FILLED = "filled_in_place"
"""The key that ``load_checkpoint`` returns when the weights are already in the model."""
_stock_setup = AutoResume.setup
_stock_load_checkpoint = MegatronStrategy.load_checkpoint
_stock_load_model_state_dict = MegatronStrategy.load_model_state_dict
_stock_save_checkpoint = MegatronStrategy.save_checkpoint
_stock_load_adapter = WrappedAdapterIO.load_checkpoint


@dataclass(kw_only=True)
class AdaptedRestoreConfig(RestoreConfig):
    """NeMo's RestoreConfig for a base into which an adapter is merged."""

    adapter: str
    """Directory of the adapter in PEFT's format, or None."""


def install() -> None:
    replace(AutoResume, "setup", _setup)
    replace(MegatronStrategy, "load_checkpoint", _load_checkpoint)
    replace(MegatronStrategy, "load_model_state_dict", _load_model_state_dict)
    replace(MegatronStrategy, "save_checkpoint", _save_checkpoint)
    replace(WrappedAdapterIO, "load_checkpoint", _load_adapter)


def in_hugging_face_layout(path: str | Path) -> bool:
    return is_hub_reference(str(path)) or (Path(path) / "config.json").is_file()


def _setup(self: AutoResume, trainer: Any, model: Any = None) -> None:
    restore = self.restore_config
    if restore is None or not in_hugging_face_layout(restore.path):
        _stock_setup(self, trainer, model)
        return
    files, architecture = _fetch(restore.path)
    if model is not None:
        check_model_config(model.config, architecture, files.source, prefix="model.config")
    restore.path = files.source
    adapter = restore.adapter if isinstance(restore, AdaptedRestoreConfig) else None
    trainer.strategy.base_model_source, trainer.strategy.base_model_adapter = files.source, adapter
    checkpoint = _weights_folder(self.get_trainer_ckpt_path(model))
    if checkpoint is None:
        trainer.strategy.restore_config = restore
    else:
        require_same_base(Path(checkpoint), files.source, adapter)
        trainer.ckpt_path = checkpoint
        trainer.checkpoint_callback.last_model_path = checkpoint
    if restore.load_artifacts and model is not None and model.tokenizer is None:
        model.tokenizer = load_tokenizer(files.source)
        model.__io__.tokenizer = model.tokenizer.__io__


def _weights_folder(checkpoint: Any) -> Any:
    """Return the folder of the weights in an adapter's checkpoint.

    With ``resume_from_path`` NeMo gives the checkpoint's own folder, and would then record it as the base model in
    every later checkpoint.
    """
    if isinstance(checkpoint, AdapterPath) and (Path(checkpoint) / WEIGHTS).is_dir():
        return AdapterPath(Path(checkpoint) / WEIGHTS, base_model_path=checkpoint.base_model_path)
    return checkpoint


def _fetch(path: str) -> tuple[ModelFiles, Architecture]:
    """Fetch and check the base; called by every rank, where one per machine downloads while the others wait."""
    files = resolve(str(path))
    architecture = read_architecture(files.config, files.directory)
    check_tensors(files.directory, architecture)
    return files, architecture


def _load_checkpoint(
    self: MegatronStrategy, checkpoint_path: str | Path, selective_restore: bool = False
) -> dict[str, Any]:
    source = _reference(getattr(checkpoint_path, "base_model_path", None) or checkpoint_path)
    if not (in_hugging_face_layout(source) or _gives_weights(self, source, selective_restore)):
        return _stock_load_checkpoint(self, checkpoint_path, selective_restore)
    load_weights(self, source)
    trained = _trainer_state(_adapter_io(self), checkpoint_path) if _is_adapter(checkpoint_path) else {}
    return {**trained, FILLED: True}


def _load_model_state_dict(self: MegatronStrategy, checkpoint: dict[str, Any], strict: bool = True) -> None:
    if FILLED not in checkpoint:
        _stock_load_model_state_dict(self, checkpoint, strict)
        return
    for optimizer in self.optimizers:
        optimizer.reload_model_params()  # the fp32 master weights were made before the weights were loaded


def _load_adapter(self: WrappedAdapterIO, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    loaded = _stock_load_adapter(self, path, *args, **kwargs)
    self.model_ckpt_path = _reference(self.model_ckpt_path)  # what it writes into the next checkpoint
    return loaded


def _is_adapter(path: str | Path) -> bool:
    return getattr(path, "base_model_path", None) is not None


def _reference(path: Any) -> str:
    """Restore a reference that NeMo passed through ``Path``, which turns hf://ORG/NAME into hf:/ORG/NAME."""
    text = str(path)
    return text.replace("hf:/", "hf://", 1) if text.startswith("hf:/") and not is_hub_reference(text) else text


def _adapter_io(strategy: MegatronStrategy) -> WrappedAdapterIO | None:
    """Return the strategy's adapter IO, which asynchronous saving wraps once more."""
    io = strategy.checkpoint_io
    while not isinstance(io, WrappedAdapterIO):
        if not isinstance(io, _WrappingCheckpointIO):
            return None
        io = io.checkpoint_io
    return io


def _trainer_state(checkpoint_io: WrappedAdapterIO, path: AdapterPath) -> dict[str, Any]:
    """Return an adapter's checkpoint without its tensors, which NeMo loads from ``adapter_ckpt_path`` once it has made
    the adapters."""
    checkpoint_io.adapter_ckpt_path = Path(str(path))
    state: dict[str, Any] = checkpoint_io.checkpoint_io.load_checkpoint(path, sharded_state_dict={})
    return state


def _gives_weights(strategy: MegatronStrategy, path: str | Path, selective_restore: bool) -> bool:
    """Return whether the path is a supported NeMo checkpoint that gives the base weights, not one to resume."""
    return (
        selective_restore
        and not strategy.restore_config.load_optim_state
        and is_nemo_checkpoint(Path(path))
        and supported_class(Path(path))
    )


def load_weights(strategy: MegatronStrategy, source: str) -> None:
    """Load a resolved source into the strategy's model, before any adapter exists."""
    started = time.monotonic()
    _require_one_source(source)
    directory = local_directory(source)
    architecture = read_architecture(read_model_config(directory), directory)
    adapter = _base_adapter(strategy, directory, architecture)
    model = strategy.megatron_parallel
    sharded, parameters = model.sharded_state_dict(), model.named_parameters()
    checkpoint: Checkpoint | DistributedWeights
    if is_nemo_checkpoint(directory):
        check_nemo_tensors(directory, architecture)
        checkpoint = DistributedWeights(directory / WEIGHTS)
        shards = fill_from_nemo(sharded, parameters, checkpoint, architecture)
    else:
        checkpoint = Checkpoint(directory)
        shards = fill(sharded, parameters, checkpoint, architecture, adapter=adapter, progress=_progress(strategy))
    strategy.base_model_source = source
    if (adapter_io := _adapter_io(strategy)) is not None:
        adapter_io.model_ckpt_path = source  # recorded in every adapter checkpoint
    logger.info(
        "Loaded %s: %d shards, %.1f MB read in %.2f s by rank %d",
        source,
        shards,
        checkpoint.bytes_read / 1e6,
        time.monotonic() - started,
        torch.distributed.get_rank(),
    )


def _base_adapter(strategy: MegatronStrategy, directory: Path, architecture: Architecture) -> BaseAdapter | None:
    adapter = getattr(strategy, "base_model_adapter", None)
    return find_adapter(adapter, directory, architecture)


def _progress(strategy: MegatronStrategy) -> LoadProgress | None:
    """Return the callback for loading progress, in bytes that this rank reads; None except on rank 0."""
    return getattr(strategy, "on_weights_read", None) if torch.distributed.get_rank() == 0 else None


def _require_one_source(source: str) -> None:
    """Refuse ranks with different commits, as a branch may move while they resolve it."""
    sources = [source] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sources, source)
    if len(set(sources)) > 1:
        raise RuntimeError(f"ranks resolved different commits, {sorted(set(sources))}; name one: hf://ORG/NAME@COMMIT")


def _save_checkpoint(
    self: MegatronStrategy, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
) -> None:
    _stock_save_checkpoint(self, checkpoint, filepath, storage_options)
    source = getattr(self, "base_model_source", None)
    if source is not None and self.is_global_zero:
        adapter = getattr(self, "base_model_adapter", None)
        record_base(ckpt_to_weights_subdir(filepath, is_saving=True), source, adapter)
