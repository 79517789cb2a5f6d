"""Run one process of a run: ``python -m qwen_cl.training.worker RUN_DIRECTORY``, one per rank.

This module imports little at the start, so that a stop request while NeMo is imported is recorded.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from qwen_cl.config.cluster import Accelerator
from qwen_cl.config.errors import EXIT_PREEMPTED, NO_ROOM_ADVICE, NOT_FINITE_ADVICE, UserError
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import load_config
from qwen_cl.config.speed import SpeedConfig, When
from qwen_cl.config.store import register_schemas
from qwen_cl.launch import heartbeat
from qwen_cl.patches.registry import UpstreamChanged
from qwen_cl.planning.speed import require_compiler
from qwen_cl.runs.failure import MEGATRON_NOT_FINITE, FailureKind, SaveError, failure_kind_of
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State
from qwen_cl.training.stop import Preempted, StopRequest

if TYPE_CHECKING:
    import nemo_run

    from qwen_cl.reporting.tracking.connection import WandbLogger


def main(directory: str) -> int:
    register_schemas()
    folder = RunFolder(directory)
    config = load_config(folder.config)
    stop = StopRequest(config.training.max_seconds)
    try:
        with folder.worker_lock() if _rank() == 0 else nullcontext():
            return _run(config, folder, stop)
    except UserError as error:  # another process holds the folder and writes its status
        print(error, file=sys.stderr)
        return error.exit_code


def _run(config: RunConfig, folder: RunFolder, stop: StopRequest) -> int:
    """Run to the end and return the exit code; rank 0 records how the run ended."""
    try:
        heartbeat.start_heartbeat()
        _train(config, folder, stop)
    except Preempted as error:
        folder.finish(State.PREEMPTED, f"stopped by {error} before training began", FailureKind.interrupted)
        return EXIT_PREEMPTED
    except BaseException as error:  # any failure must be recorded
        traceback.print_exc()
        if stop.came_before_training:
            folder.finish(State.PREEMPTED, "stopped before training began", FailureKind.interrupted)
            return EXIT_PREEMPTED
        kind = failure_kind_of(error)
        why = _reason(error, kind, config.speed)
        if not heartbeat.report_failure(why, kind):
            folder.finish(State.FAILED, why, kind)
        return 1
    heartbeat.mark_done()
    if _rank() != 0:
        return 0
    if stop.kind is not None and folder.status().step < config.training.max_steps:
        folder.finish(State.PREEMPTED, stop.reason, stop.kind)
        return EXIT_PREEMPTED
    folder.finish(State.COMPLETED)
    return 0


def _train(config: RunConfig, folder: RunFolder, stop: StopRequest) -> None:
    if _rank() == 0:
        folder.update_status(phase="importing NeMo")
    require_compiler(config)
    gc.disable()  # saves a tenth of NeMo's import time
    prepare(config)
    from qwen_cl.training.callbacks.base import RunContext, build_bound
    from qwen_cl.training.callbacks.metrics import peak_memory_gib

    recipe = load_recipe(config, folder)
    gc.freeze()
    gc.enable()
    with _wandb_logger(config, folder) as logger:
        task = build_bound(recipe, RunContext(stop=stop, wandb_logger=logger))
        task()
        if logger is not None:
            logger.log_adapter(config.wandb.log_adapter)
    if _rank() == 0:
        folder.update_status(peak_memory_gib=peak_memory_gib())


@contextmanager
def _wandb_logger(config: RunConfig, folder: RunFolder) -> Iterator[WandbLogger | None]:
    """Start W&B on rank 0."""
    if _rank() != 0:
        yield None
        return
    from qwen_cl.reporting.tracking.start import wandb_logger

    folder.update_status(phase="starting W&B")
    with wandb_logger(config, folder) as logger:
        folder.update_status(phase="loading the model")
        yield logger


def prepare(config: RunConfig) -> None:
    """Import NeMo and Megatron, patched for the device of this run."""
    from qwen_cl.training import setup

    logging.basicConfig(format="[qwen_cl] %(message)s")  # retains handlers that others have set up
    logging.getLogger("qwen_cl").setLevel(logging.INFO)
    setup.prepare(cpu=config.cluster.accelerator is Accelerator.cpu)


def load_recipe(config: RunConfig, folder: RunFolder) -> nemo_run.Partial:
    from qwen_cl.models.architecture import read_architecture
    from qwen_cl.models.reference import local_directory, read_model_config
    from qwen_cl.training.recipe import build_recipe

    model_directory = local_directory(config.model.source)
    architecture = read_architecture(read_model_config(model_directory), model_directory)
    return build_recipe(config, architecture, folder, folder.status().resume_from)


def _reason(error: BaseException, kind: FailureKind, speed: SpeedConfig) -> str:
    text = " ".join(str(error).split()) or "no message"
    if found := MEGATRON_NOT_FINITE.search(text):
        return f"FloatingPointError: the gradient is {found[1]}; {NOT_FINITE_ADVICE}"
    if isinstance(error, UserError | SaveError | UpstreamChanged):
        return text[:500]
    if kind is FailureKind.disk_full:
        return f"{text}: the disk is full. {NO_ROOM_ADVICE}"
    fix = ""
    if kind is FailureKind.out_of_memory:
        fix = "; lower task.micro_batch_size or task.sequence_length"
        fix += "" if speed.activation_recompute is When.always else ", or set speed.activation_recompute=always"
    return f"{type(error).__name__}: {text[:500]}{fix}"


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
