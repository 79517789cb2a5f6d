"""Saving while a run trains: a checkpoint appears whole, with the sha256 of each of its files, or not at all."""

from __future__ import annotations

import errno
import logging
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from nemo import lightning as nl
from nemo.lightning.io.pl import TrainerContext
from torch.distributed.checkpoint.api import CheckpointException

from qwen_cl import member
from qwen_cl.callbacks import RunRecorder, require_finite
from qwen_cl.checkpoints.folder import clear_leftovers, partial_path, prune, publish, size_of
from qwen_cl.checkpoints.manifest import Manifest, SavedFile, file_names, hash_files, write_manifest

logger = logging.getLogger(__name__)
ADAM_BYTES = 12
"""Per parameter: its fp32 copy, and Adam's two moments."""
SMALL_FILES = 64 * 2**20
"""Bytes allowed for what else is in a checkpoint: the tokenizer, NeMo's context, indices."""


class NoRoomError(OSError):
    """The disk cannot take a checkpoint; what was saved before is untouched."""


class StepCheckpoint(nl.ModelCheckpoint):
    """Every so many steps, and at the end of training whatever ended it; with the optimizer's state each time, so that
    all of them can be gone on from.

    What NeMo's own class knows of the checkpoints there are, it writes into each: here the disk says it.
    """

    def __init__(self, *, dirpath: str, every_n_train_steps: int, keep_last: int, keep_best: int) -> None:
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
        self._saved_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        super().setup(trainer, *args, **kwargs)
        if trainer.is_global_zero and self.directory.is_dir():
            clear_leftovers(self.directory)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not NeMo's: it writes the checkout's diff, whatever that holds, beside its logs.
        pl.callbacks.ModelCheckpoint.on_train_start(self, trainer, pl_module)
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.interval == 0:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Unless this step is saved; every rank calls.

        Raises:
            FloatingPointError: the last step's loss or gradient is not finite.
            NoRoomError: on every rank, where the disk is full or would be.
        """
        step = trainer.global_step
        if step in (self._saved_step, 0):
            return
        require_finite(trainer)  # and the last good checkpoint stays the newest
        partial = partial_path(self.directory, step)
        self._together(trainer, partial, lambda: self._begin(trainer))
        self._together(trainer, partial, lambda: self._write(trainer, partial))
        names = _own_names(partial, trainer)
        hashes: dict[str, str] = {}
        self._together(trainer, partial, lambda: hashes.update(hash_files(partial, names)))
        every: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, hashes)
        self._together(trainer, partial, lambda: self._publish(trainer, partial, every))
        self._saved_step = step

    def _together(self, trainer: pl.Trainer, partial: Path, action: Any) -> None:
        """Do it on every rank; where one of them fails, all of them do, and nothing half-written is left."""
        fault: BaseException | None = None
        member.progress()
        try:
            action()
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            fault = error
        faults: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(faults, None if fault is None else _told(fault, self.directory))
        told = next((text for text in faults if text is not None), None)
        if told is None:
            return
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        raise (NoRoomError(told) if told.startswith("no room") else RuntimeError(told)) from fault

    def _begin(self, trainer: pl.Trainer) -> None:
        needed = expected_size(trainer)
        if not trainer.is_global_zero:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.directory)
        needed = size_of(self.directory) or needed
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise NoRoomError(
                errno.ENOSPC, f"a checkpoint takes {_amount(needed)} and {_amount(free)} are free", str(self.directory)
            )

    def _write(self, trainer: pl.Trainer, partial: Path) -> None:
        trainer.save_checkpoint(str(partial))
        if trainer.is_global_zero:
            TrainerContext.from_trainer(trainer).io_dump(partial / "context", yaml_attrs=["model"])

    def _publish(self, trainer: pl.Trainer, partial: Path, hashes: list[dict[str, str]]) -> None:
        if not trainer.is_global_zero:
            return
        files = {
            name: SavedFile((partial / name).stat().st_size, digest)
            for name, digest in sorted(item for own in hashes for item in own.items())
        }
        step = trainer.global_step
        write_manifest(partial, Manifest(step, _val_loss(trainer), files))
        publish(partial, self.directory / f"step={step}")
        for checkpoint in prune(self.directory, self.keep_last, self.keep_best):
            logger.info("Removed %s", checkpoint.path)


def expected_size(trainer: pl.Trainer) -> int:
    """Bytes of a checkpoint on all ranks together, before there is one to measure; every rank calls."""
    trained = [parameter for parameter in trainer.strategy.megatron_parallel.parameters() if parameter.requires_grad]
    own = sum(parameter.numel() * (parameter.element_size() + ADAM_BYTES) for parameter in trained)
    total = torch.tensor(float(own), device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total) // parallel_state.get_data_parallel_world_size() + SMALL_FILES


def _own_names(partial: Path, trainer: pl.Trainer) -> list[str]:
    """Each rank hashes its share."""
    return file_names(partial)[trainer.global_rank :: trainer.world_size]


def _val_loss(trainer: pl.Trainer) -> float | None:
    recorder = next((callback for callback in trainer.callbacks if isinstance(callback, RunRecorder)), None)
    return None if recorder is None else recorder.val_loss_at(trainer.global_step)


def _told(error: BaseException, directory: Path) -> str:
    """What went wrong, to every rank. Torch wraps what writing raises, so a full disk is asked for too."""
    text = " ".join(str(error).split())
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text
    full = full or shutil.disk_usage(directory).free < (size_of(directory) or 0)  # its writer has words of its own
    if not full:
        return f"{type(error).__name__}: {text[:500]}"
    detail = error.strerror if isinstance(error, NoRoomError) else "the disk is full"
    return (
        f"no room for a checkpoint in {directory}: {detail}. What was saved before is untouched; make room, and the "
        "same command goes on from there"
    )


def _amount(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
