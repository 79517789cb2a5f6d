"""The checkpoints of a run: which are whole, which are kept, and how one comes and goes in a single rename."""

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
"""How the folder of one begins that is being written; what was killed meanwhile stays under that name."""
REMOVED = ".removed-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    step: int
    path: Path

    @property
    def weights(self) -> Path:
        """Megatron's distributed checkpoint in it."""
        return self.path / "weights"


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """Those that were saved to the end, the newest first; whether they still are what was saved is another question."""
    found = [
        Checkpoint(int(match[1]), path)
        for path in directory.glob("step=*")
        if (match := NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def latest_valid_checkpoint(
    directory: Path, progress: VerifyProgress | None = None
) -> tuple[Checkpoint | None, list[tuple[Checkpoint, str]]]:
    """The newest checkpoint that is what was saved, and each newer one with what is wrong with it.

    One without a manifest counts as damaged: nobody can say what it holds.
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
    """After its manifest was written: on the disk first, then under its name, in one step."""
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    remove(final)  # of a run that came here before, and is older than what was just trained
    partial.rename(final)
    flush(final.parent)


def remove(path: Path) -> None:
    """Never half of it under its own name, whenever this process is killed."""
    if not path.exists():
        return
    aside = path.with_name(f"{REMOVED}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(directory: Path) -> None:
    """Of saves and removals that were cut off."""
    for prefix in (PARTIAL, REMOVED):
        for path in directory.glob(f"{prefix}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def prune(directory: Path, keep_last: int, keep_best: int) -> list[Checkpoint]:
    """Remove what is neither among the newest nor among the best; returns what was removed.

    Only checkpoints that are whole are looked at, and as ``keep_last`` is at least 1, the newest of them stays.
    """
    whole = complete_checkpoints(directory)
    manifests = {checkpoint: manifest for checkpoint in whole if (manifest := _readable(checkpoint)) is not None}
    best = best_of(manifests, keep_best)
    surplus = [checkpoint for checkpoint in list(manifests)[keep_last:] if checkpoint not in best]
    for checkpoint in surplus:
        remove(checkpoint.path)
    return surplus


def best_of(manifests: dict[Checkpoint, CheckpointManifest], count: int) -> Sequence[Checkpoint]:
    """Those with the lowest validation loss, of the ones that have one."""
    losses = {checkpoint: manifest.val_loss for checkpoint, manifest in manifests.items()}
    measured = [(loss, checkpoint) for checkpoint, loss in losses.items() if loss is not None]
    return [checkpoint for _, checkpoint in sorted(measured, key=lambda pair: pair[0])[:count]]


def size_of(directory: Path) -> int | None:
    """Bytes of the newest whole checkpoint; None where there is none."""
    manifests: Iterable[CheckpointManifest | None] = map(_readable, complete_checkpoints(directory))
    return next((manifest.size for manifest in manifests if manifest is not None), None)


def _readable(checkpoint: Checkpoint) -> CheckpointManifest | None:
    try:
        return read_manifest(checkpoint.path)
    except DamagedCheckpointError:
        return None
