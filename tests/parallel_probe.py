"""Trains run folders one after another in one group of ranks, each in the layout its config says.

Run by ``tests.ranks``. What a run recorded is in its own metrics.jsonl. Adapters start with values of their own, the
same in every layout: Megatron draws each stage's anew.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.file import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.run_folder import RunFolder
from qwen_cl.worker import load_recipe, prepare
from tests.resume_probe import forget_training


@dataclass(frozen=True)
class Training:
    directory: Path
    last_step: int
    resumed_from: Path | None = None
    """Another run's directory: from its newest checkpoint."""
    saves: bool = False


def main(trainings: list[Training]) -> None:
    register_schemas()
    prepare(load_config(trainings[0].directory / "config.yaml"))
    store = _open_store()
    for number, training in enumerate(trainings):
        _train(training, _of_one_group(store, number))
        forget_training()


def _open_store() -> Any:
    """For every group that these ranks form one after another: each would else open the same port again."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if os.environ["WORLD_SIZE"] == "1":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=os.environ["RANK"] == "0", wait_for_workers=False)


def _of_one_group(store: Any, number: int) -> Any:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return None if store is None else PrefixStore(str(number), store)


def _train(training: Training, store: Any) -> None:
    import fiddle
    import lightning.pytorch as pl

    class Probe(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                _fill_adapters(trainer.strategy.megatron_parallel)
                for optimizer in trainer.strategy.optimizers:
                    optimizer.reload_model_params()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == training.last_step

    folder = RunFolder(training.directory)
    recipe = load_recipe(load_config(folder.config), folder)
    if training.resumed_from is not None:
        recipe.resume.resume_if_exists = True
        recipe.resume.resume_from_directory = str(RunFolder(training.resumed_from).checkpoints)
    if training.saves:
        recipe.log.ckpt.save_last = True  # which NeMo looks for
    else:
        recipe.log.ckpt = None
        recipe.trainer.enable_checkpointing = False
    task = fiddle.build(recipe)
    task.keywords["trainer"].strategy.store = store
    task.keywords["trainer"].callbacks.insert(0, Probe())
    task()


def _fill_adapters(model: Any) -> None:
    """Each shard is cut out of the same whole tensor."""
    import torch

    from qwen_cl.source.shards import layer_of, local_shards

    for shard in local_shards(model.sharded_state_dict()):
        if ".adapter." not in shard.key or "magnitude" in shard.key:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{shard.key} {layer_of(shard)}".encode()))
        skipped = shard.prepend_axis_num
        whole = torch.randn(shard.global_shape[skipped:], generator=generator) * 0.02
        offset = shard.global_offset[skipped:]
        part = tuple(slice(start, start + size) for start, size in zip(offset, shard.data.shape))
        shard.data.detach().copy_(whole[part])
