"""Trains recipes to step 4, whole or stopped at step 2, or resumes them; writes the loss of every step.

``python tests/resume_probe.py OUT RUN_DIRECTORY:MODE...``, where RUN_DIRECTORY holds the config.yaml of a run and
MODE is ``whole``, ``stopped``, ``resumed`` or ``refused=SOURCE``. Every training in one process, because importing
NeMo is what takes long; resumes in another one than what they resume.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_cl.config.file import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.run_folder import RunFolder
from qwen_cl.worker import load_recipe, prepare


def main(out: Path, arguments: list[str]) -> None:
    register_schemas()
    prepare(load_config(Path(arguments[0].partition(":")[0]) / "config.yaml"))
    results = {}
    for argument in arguments:
        directory, _, mode = argument.partition(":")
        results[f"{Path(directory).name}:{mode.partition('=')[0]}"] = train(RunFolder(directory), mode)
    out.write_text(json.dumps(results))


def train(folder: RunFolder, mode: str) -> Any:
    import fiddle
    import lightning.pytorch as pl

    losses: dict[int, float] = {}

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            losses[trainer.global_step] = float(trainer.callback_metrics["reduced_train_loss"])
            trainer.should_stop = mode == "stopped" and trainer.global_step == 2

    mode, _, source = mode.partition("=")
    config = load_config(folder.config)
    if source:
        config = replace(config, model=replace(config.model, source=source))
    recipe = load_recipe(config, folder)
    recipe.log.ckpt.save_last = True
    recipe.resume.resume_if_exists = mode in ("resumed", "refused")
    recipe.resume.resume_from_directory = str(folder.checkpoints)
    if mode == "resumed":
        shutil.rmtree(folder.adapter, ignore_errors=True)  # of the stopped run; only a whole new one is written
    task = fiddle.build(recipe)
    task.keywords["trainer"].callbacks.append(Probe())
    try:
        task()
    except RuntimeError as error:
        return [type(error).__name__, str(error)]
    finally:
        forget_training()
    return losses


def forget_training() -> None:
    """Megatron's global state, so that one process can train again."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.tensor_parallel import random

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    unset_num_microbatches_calculator()
    random.get_cuda_rng_tracker().reset()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
