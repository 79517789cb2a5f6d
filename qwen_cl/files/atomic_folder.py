"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

from qwen_cl.config.errors import UserError
from qwen_cl.files.atomic import flush


@contextmanager
def atomic_directory(directory: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``directory`` when the context ends, or removed if it fails.

    With ``replace`` an existing folder is replaced. A killed process leaves the temporary folder behind, hidden under a
    name that starts with a dot.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for the owner alone
            flush(path)
        temporary.chmod(0o755)
        if replace:
            shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def leftovers(directory: Path) -> list[Path]:
    """Return the temporary folders of ``directory`` that killed processes left behind."""
    return sorted(directory.parent.glob(f".{directory.name}-*"))


def require_room(key: str, directory: Path, size: int) -> None:
    """Check that a folder, set by the config key ``key``, can be written and that ``size`` bytes are free.

    Raises:
        UserError: The folder cannot be written, or the disk is too full.
    """
    parent = next(parent for parent in directory.parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{key} ({directory}): {parent} is a file; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise UserError(f"{key} ({directory}): {parent} cannot be written to; choose another folder")
    free = shutil.disk_usage(parent).free
    if size > free:
        remains = ", ".join(path.name for path in leftovers(directory))
        hint = f" (an export that was killed left {remains})" if remains else ""
        amounts = f"needs {decimal(size, precision=2)} and {decimal(free, precision=2)} are free there"
        raise UserError(f"{key} ({directory}) {amounts}{hint}; free disk space, or choose another folder")
