"""Which commit a dataset's reference meant when it was last read, for the times without a network."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.files.atomic import write_text


def remember(root: Path, source: TextSource, commit: str) -> None:
    """No failure where the cache cannot be written to: this only helps later."""
    with suppress(OSError):
        write_text(_path(root, source), commit)


def recall(root: Path, source: TextSource) -> str | None:
    """None where the Hub can be asked, and where the reference was never read."""
    from datasets import config

    if not config.HF_HUB_OFFLINE:
        return None
    with suppress(OSError):
        return _path(root, source).read_text(encoding="utf-8")
    return None


def _path(root: Path, source: TextSource) -> Path:
    name = hashlib.sha256(json.dumps([source.path, source.subset]).encode()).hexdigest()
    return root / "references" / name
