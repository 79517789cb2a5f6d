"""Save checkpoints during training: each appears complete, with the sha256 of all its files, or not at all.

With ``task.async_save`` training resumes as soon as the state is copied: Megatron's writers are separate processes
(qwen_cl/patches/async_writers.py), and a thread of each rank hashes. What all ranks do together, such as publishing the
checkpoint, happens between steps, once all writers have finished.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from nemo import lightning as nl
from nemo.lightning.io.pl import TrainerContext
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizerCallback
from torch.distributed.checkpoint.api import CheckpointException

from qwen_cl.launch import heartbeat
from qwen_cl.patches.async_writers import Writers
from qwen_cl.runs.checkpoints import clear_leftovers, partial_path, prune, publish, size_of
from qwen_cl.runs.failure import FailureKind, SaveError
from qwen_cl.runs.manifest import CheckpointManifest, SavedFile, file_names, hash_files, write_checkpoint_manifest
from qwen_cl.training.callbacks.base import Bound
from qwen_cl.training.callbacks.disk_space import describe_save_error, expected_size, require_room

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Unfinished:
    """A checkpoint that is being written."""

    step: int
    val_loss: float | None
    partial: Path
    hashes: Future[dict[str, str]] | None = None
    """None while Megatron's writers are at work."""


class StepCheckpoint(Bound, nl.ModelCheckpoint, AsyncFinalizerCallback):
    """The checkpoints every so many steps and at the end of training, each with the optimizer's state to resume from.

    NeMo's class records the existing checkpoints in each checkpoint; here they are read from the disk. And NeMo adds a
    callback that finishes asynchronous saves if there is none: this class is one.
    """

    def __init__(
        self, *, dirpath: str, every_n_train_steps: int, async_save: bool, keep_last: int, keep_best: int
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="{step}",
            monitor=None,
            save_top_k=-1,
            save_last=False,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=False,
            save_optim_on_train_end=True,
        )
        self.directory = Path(dirpath)
        self.interval, self.keep_last, self.keep_best = every_n_train_steps, keep_last, keep_best
        self.waits = not async_save  # NeMo's attribute is that of the strategy, which is always asynchronous
        self._saved_step = self._needed = 0
        self._writers: Writers | None = None
        self._unfinished: _Unfinished | None = None
        self._thread = ThreadPoolExecutor(1, "hashes")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        super().setup(trainer, *args, **kwargs)
        if trainer.is_global_zero and self.directory.is_dir():
            clear_leftovers(self.directory)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Replaces NeMo's, which writes the diff of the checkout, secrets included, to its logs.
        pl.callbacks.ModelCheckpoint.on_train_start(self, trainer, pl_module)
        self._saved_step = trainer.global_step
        self._writers = Writers(trainer.strategy.checkpoint_io.async_calls_queue)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.interval == 0:
            self.save(trainer)
        self.finish(trainer, wait=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)
        self.finish(trainer, wait=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish the checkpoint that is being written, so that a later failure does not lose it; other ranks may be
        gone."""
        if trainer.world_size > 1:
            if self._writers is not None:
                self._writers.end()
            return
        try:
            self.finish(trainer, wait=True)
        except (RuntimeError, OSError) as error:  # the run already has its reason
            logger.warning("The checkpoint that was being written could not be finished: %s", error)

    def save(self, trainer: pl.Trainer) -> None:
        """Start a checkpoint, unless this step is saved, and wait for it if training may not continue; every rank
        calls.

        Raises:
            FloatingPointError: the last step's loss or gradient is not finite.
            SaveError: on every rank, if one of them cannot write: the disk is full, or would be.
        """
        step = trainer.global_step
        if step in (self._saved_step, 0):
            return
        self.finish(trainer, wait=True)  # the previous one: never two at a time
        if (recorder := self.context.recorder) is not None:
            recorder.record_last_step(trainer)  # raises if the step is not finite: nothing is saved
        partial = partial_path(self.directory, step)
        self._together(trainer, partial, lambda: self._begin(trainer))
        self._together(trainer, partial, lambda: self._write(trainer, partial))
        self._unfinished = _Unfinished(step, None if recorder is None else recorder.val_loss_at(step), partial)
        self._saved_step = step
        if not _everywhere(trainer, self._may_continue()):
            self.finish(trainer, wait=True)

    def finish(self, trainer: pl.Trainer, *, wait: bool) -> None:
        """Finish a started checkpoint, as far as possible without waiting unless ``wait``; every rank calls.

        Raises:
            SaveError: on every rank, if one of them cannot write.
        """
        if (unfinished := self._unfinished) is None:
            return
        self._unfinished = None  # it ends here, also with an error
        partial = unfinished.partial
        if unfinished.hashes is None:
            writers, finished = self._writers, list[bool]()
            assert writers is not None
            self._together(trainer, partial, lambda: finished.append(writers.are_finished(wait=wait)))
            if finished[0]:
                unfinished.hashes = self._thread.submit(_hash_own, partial, trainer.global_rank, trainer.world_size)
        if unfinished.hashes is None or not (wait or _everywhere(trainer, unfinished.hashes.done())):
            self._unfinished = unfinished
            return
        hashes, own_hashes = unfinished.hashes, dict[str, str]()
        every: list[dict[str, str]] = [{}] * trainer.world_size
        self._together(trainer, partial, lambda: own_hashes.update(hashes.result()))
        torch.distributed.all_gather_object(every, own_hashes)
        self._together(trainer, partial, lambda: self._publish(trainer, unfinished, every))

    def _may_continue(self) -> bool:
        """Return whether training may continue while this rank's writers write. On a CPU they read a copy of the
        state."""
        return not self.waits and psutil.virtual_memory().available > self._needed

    def _together(self, trainer: pl.Trainer, partial: Path, action: Callable[[], Any]) -> None:
        """Run ``action`` on every rank. If one rank fails, all fail, and no partial checkpoint remains."""
        fault: BaseException | None = None
        heartbeat.progress()
        try:
            action()
        except (Exception, CheckpointException) as error:  # torch's CheckpointException is not an Exception
            fault = error
        faults: list[tuple[str, FailureKind] | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(
            faults, None if fault is None else describe_save_error(fault, self.directory)
        )
        first = next((each for each in faults if each is not None), None)
        if first is None:
            return
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(*first) from fault

    def _begin(self, trainer: pl.Trainer) -> None:
        expected = expected_size(trainer)
        self._needed = size_of(self.directory) or expected
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.directory)
            require_room(self.directory, self._needed)

    def _write(self, trainer: pl.Trainer, partial: Path) -> None:
        trainer.save_checkpoint(str(partial))
        if trainer.is_global_zero:
            TrainerContext.from_trainer(trainer).io_dump(partial / "context", yaml_attrs=["model"])

    def _publish(self, trainer: pl.Trainer, saved: _Unfinished, hashes: list[dict[str, str]]) -> None:
        if not trainer.is_global_zero:
            return
        partial = saved.partial
        files = {
            name: SavedFile((partial / name).stat().st_size, digest)
            for name, digest in sorted(item for each in hashes for item in each.items())
        }
        write_checkpoint_manifest(partial, CheckpointManifest(saved.step, saved.val_loss, files))
        publish(partial, self.directory / f"step={saved.step}")
        for checkpoint in prune(self.directory, self.keep_last, self.keep_best):
            logger.info("Removed %s", checkpoint.path)


def _everywhere(trainer: pl.Trainer, done: bool) -> bool:
    if trainer.world_size == 1:
        return done
    everywhere = torch.tensor(int(done), device=torch.cuda.current_device())
    torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN)
    return bool(everywhere)


def _hash_own(partial: Path, rank: int, ranks: int) -> dict[str, str]:
    """Return the sha256 of this rank's share of the files."""
    return hash_files(partial, file_names(partial)[rank::ranks])
