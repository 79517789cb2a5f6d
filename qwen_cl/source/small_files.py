"""The files of a model beside its weights: what a run keeps, and what an export carries on."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen_cl.source.snapshot import FILES


def copy_small_files(source: Path, target: Path) -> None:
    """Config, tokenizer and chat template into ``target``, which is made; the files themselves where the Hub's cache
    has links."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
