"""Record of the last commit of each Hub dataset reference, for offline use."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.files.atomic import write_text


def remember(root: Path, source: TextSource, commit: str) -> None:
    """Record the commit of a reference. Errors of writing are ignored, as the record is optional."""
    with suppress(OSError):
        write_text(_path(root, source), commit)


def recall(root: Path, source: TextSource) -> str | None:
    """Return the recorded commit of a reference; None if online, or never recorded."""
    from datasets import config

    if not config.HF_HUB_OFFLINE:
        return None
    with suppress(OSError):
        return _path(root, source).read_text(encoding="utf-8")
    return None


def _path(root: Path, source: TextSource) -> Path:
    name = hashlib.sha256(json.dumps([source.path, source.subset]).encode()).hexdigest()
    return root / "references" / name
