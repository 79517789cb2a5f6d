"""The manifest of a checkpoint: the size and sha256 of every file when it was written.

Megatron loads a flipped bit silently, and unpickles ``.metadata`` and ``common.pt``, which can execute any code: no
file is loaded before its sha256 is verified.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_cl.files.hashing import hash_file

MANIFEST = "manifest.json"
"""In the checkpoint's folder; written last."""
READERS = 8
VerifyProgress = Callable[[int, int], None]
"""Called with the bytes read so far and the total bytes."""


class DamagedCheckpointError(Exception):
    """A checkpoint's files differ from its manifest. Names the file."""


@dataclass(frozen=True, slots=True)
class SavedFile:
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    step: int
    val_loss: float | None
    """Validation loss of the target at that step, or None if it was not evaluated there."""
    files: dict[str, SavedFile]
    """The files by their path in the checkpoint's folder."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def hash_files(directory: Path, names: Iterable[str], progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """Return the sha256 of each file, reading several at a time.

    ``progress`` is called with the size of each block that was read.
    """
    names = list(names)
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(directory / name, on_read=progress), names)))


def file_names(directory: Path) -> list[str]:
    """Return the names of all files that a manifest has to list."""
    paths = (path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(str(path.relative_to(directory)) for path in paths if path != directory / MANIFEST)


def write_checkpoint_manifest(directory: Path, manifest: CheckpointManifest) -> None:
    (directory / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest.

    Raises:
        DamagedCheckpointError: it is missing or cannot be read.
    """
    try:
        saved = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): SavedFile(int(file["size"]), str(file["sha256"])) for name, file in saved["files"].items()}
        return CheckpointManifest(int(saved["step"]), saved["val_loss"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error


def verify(directory: Path, progress: VerifyProgress | None = None) -> CheckpointManifest:
    """Verify every file against the manifest; sizes first, which costs nothing.

    Raises:
        DamagedCheckpointError: a file is missing, differs from the manifest, or was added.
    """
    manifest = read_manifest(directory)
    existing = file_names(directory)
    if added := sorted(set(existing) - manifest.files.keys()):
        raise DamagedCheckpointError(f"{added[0]} is not listed in its manifest")
    for name, file in manifest.files.items():
        _check_size(directory / name, name, file)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, manifest.size)

    try:
        found = hash_files(directory, manifest.files, count)
    except OSError as error:
        raise DamagedCheckpointError(f"{error.filename} cannot be read ({error.strerror})") from error
    for name, file in manifest.files.items():
        if found[name] != file.sha256:
            raise DamagedCheckpointError(f"{name} does not match its checksum (sha256 {found[name][:12]}…)")
    return manifest


def _check_size(path: Path, name: str, file: SavedFile) -> None:
    if path.is_symlink() or not path.is_file():
        raise DamagedCheckpointError(f"{name} is missing")
    if path.stat().st_size != file.size:
        raise DamagedCheckpointError(f"{name} has {path.stat().st_size} bytes of {file.size}")
