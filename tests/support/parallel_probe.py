"""The probe that trains run folders one after another in one group of ranks, each in the layout of its config.

Run by ``tests.support.ranks``. Each run's results are in its metrics.jsonl.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.runs.checkpoints import complete_checkpoints
from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.worker import load_recipe, prepare


@dataclass(frozen=True)
class Training:
    directory: Path
    last_step: int
    resumed_from: Path | None = None
    """Directory of the run from whose newest checkpoint to start, or None."""
    saves: bool = False


def main(trainings: list[Training]) -> None:
    register_schemas()
    prepare(load_config(trainings[0].directory / "config.yaml"))
    store = _open_store()
    for number, training in enumerate(trainings):
        _train(training, _of_one_group(store, number))
        forget_training()


def _open_store() -> Any:
    """Open one store for all groups that these ranks form in turn, as each would open the same port."""
    import torch.distributed as distributed

    if os.environ["WORLD_SIZE"] == "1":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place: Any = distributed
    return place.TCPStore(address, port, is_master=os.environ["RANK"] == "0", wait_for_workers=False)


def _of_one_group(store: Any, number: int) -> Any:
    import torch.distributed as distributed

    place: Any = distributed
    return None if store is None else place.PrefixStore(str(number), store)


def _train(training: Training, store: Any) -> None:
    import lightning.pytorch as pl

    from qwen_cl.training.callbacks.base import RunContext, build_bound

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == training.last_step

    folder = RunFolder(training.directory)
    recipe = load_recipe(load_config(folder.config), folder)
    if training.resumed_from is not None:
        recipe.resume.resume_from_path = str(complete_checkpoints(RunFolder(training.resumed_from).checkpoints)[0].path)
    if not training.saves:
        recipe.log.ckpt = None
        recipe.trainer.enable_checkpointing = False
    task = build_bound(recipe, RunContext())
    task.keywords["trainer"].strategy.store = store
    task.keywords["trainer"].callbacks.insert(0, Probe())
    task()


def forget_training() -> None:
    """Reset Megatron's global state, so that one process can train again."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.tensor_parallel import random

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    unset_num_microbatches_calculator()
    random.get_cuda_rng_tracker().reset()
