"""The checkpoints of a run: find, verify, publish and prune them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_cl.files.atomic import flush
from qwen_cl.runs.manifest import (
    MANIFEST,
    CheckpointManifest,
    DamagedCheckpointError,
    VerifyProgress,
    read_manifest,
    verify,
)

NAME = re.compile(r"step=(\d+)")
PARTIAL = ".saving-"
"""Prefix of a checkpoint's folder while it is being written. A killed save leaves the folder under this name."""
REMOVED = ".removed-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    step: int
    path: Path

    @property
    def weights(self) -> Path:
        """The folder of Megatron's distributed checkpoint."""
        return self.path / "weights"


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """Return the checkpoints that were saved completely, newest first. Their files are not verified."""
    found = [
        Checkpoint(int(match[1]), path)
        for path in directory.glob("step=*")
        if (match := NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def latest_valid_checkpoint(
    directory: Path, progress: VerifyProgress | None = None
) -> tuple[Checkpoint | None, list[tuple[Checkpoint, str]]]:
    """Return the newest checkpoint that passes verification, and each newer one with the reason why it fails.

    A checkpoint without a manifest counts as damaged, because its contents cannot be verified.
    """
    damaged = []
    candidates = [(int(match[1]), path) for path in directory.glob("step=*") if (match := NAME.fullmatch(path.name))]
    for step, path in sorted(candidates, reverse=True):
        checkpoint = Checkpoint(step, path)
        try:
            manifest = verify(path, progress)
            if manifest.step != step:
                raise DamagedCheckpointError(f"{MANIFEST} is of step {manifest.step}")
        except DamagedCheckpointError as error:
            damaged.append((checkpoint, str(error)))
        else:
            return checkpoint, damaged
    return None, damaged


def partial_path(directory: Path, step: int) -> Path:
    return directory / f"{PARTIAL}step={step}"


def publish(partial: Path, final: Path) -> None:
    """Move a checkpoint to its final name in one rename, after all its files are flushed to disk."""
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    remove(final)  # a checkpoint of an earlier attempt, older than this one
    partial.rename(final)
    flush(final.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint. A killed process never leaves a partial one under its own name."""
    if not path.exists():
        return
    aside = path.with_name(f"{REMOVED}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(directory: Path) -> None:
    """Remove the files of interrupted saves and removals."""
    for prefix in (PARTIAL, REMOVED):
        for path in directory.glob(f"{prefix}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def prune(directory: Path, keep_last: int, keep_best: int) -> list[Checkpoint]:
    """Remove the checkpoints that are neither among the newest nor among the best, and return them.

    Only complete checkpoints are considered. As ``keep_last`` is at least 1, the newest of them stays.
    """
    complete = complete_checkpoints(directory)
    manifests = {checkpoint: manifest for checkpoint in complete if (manifest := _readable(checkpoint)) is not None}
    best = best_of(manifests, keep_best)
    surplus = [checkpoint for checkpoint in list(manifests)[keep_last:] if checkpoint not in best]
    for checkpoint in surplus:
        remove(checkpoint.path)
    return surplus


def best_of(manifests: dict[Checkpoint, CheckpointManifest], count: int) -> Sequence[Checkpoint]:
    """Return the checkpoints with the lowest validation loss, among those that have one."""
    losses = {checkpoint: manifest.val_loss for checkpoint, manifest in manifests.items()}
    measured = [(loss, checkpoint) for checkpoint, loss in losses.items() if loss is not None]
    return [checkpoint for _, checkpoint in sorted(measured, key=lambda pair: pair[0])[:count]]


def size_of(directory: Path) -> int | None:
    """Return the bytes of the newest complete checkpoint, or None without one."""
    manifests: Iterable[CheckpointManifest | None] = map(_readable, complete_checkpoints(directory))
    return next((manifest.size for manifest in manifests if manifest is not None), None)


def _readable(checkpoint: Checkpoint) -> CheckpointManifest | None:
    try:
        return read_manifest(checkpoint.path)
    except DamagedCheckpointError:
        return None
