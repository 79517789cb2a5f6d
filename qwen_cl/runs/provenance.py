"""The versions and commits that are recorded with a run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

VERSIONS_OF = ("qwen_cl", "torch", "nemo_toolkit", "megatron-core", "nemo_run", "transformers", "lightning", "wandb")


def versions(names: Iterable[str] = VERSIONS_OF) -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_commit(directory: Path) -> str | None:
    """Return the commit of the code, with ``-dirty`` if files differ from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
