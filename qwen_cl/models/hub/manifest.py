"""The list of a commit's files with their hashes, stored beside it in the Hub's cache.

It is needed offline to tell whether a cached snapshot is complete and its files undamaged.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_cl.files.atomic import write_text

DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
OURS = ".qwen_cl"
"""Our folder in a repository's folder of the cache, which huggingface_hub ignores."""


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    size: int | None
    """Bytes, or None if the endpoint does not give it."""
    digest: str | None
    """The sha256 (64 hex) of a file in LFS, git's blob id (40 hex) of any other, or None if it is not given."""


@dataclass(frozen=True, slots=True)
class ModelManifest:
    commit: str
    license: str | None
    """The license according to the model card, or None."""
    files: dict[str, RepositoryFile]
    """All files of the commit, by path in the repository."""


def from_hub(info: Any) -> ModelManifest:
    """Return the manifest from huggingface_hub's ModelInfo, requested with ``files_metadata``."""
    files = {}
    for file in info.siblings or []:
        digest = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
        size = file.lfs.size if file.lfs else file.size
        files[file.rfilename] = RepositoryFile(size, digest if DIGEST.fullmatch(digest) else None)
    license = getattr(info.card_data, "license", None)
    return ModelManifest(info.sha, license if isinstance(license, str) else None, files)


def read_manifest(repository: Path, commit: str) -> ModelManifest | None:
    """Return a commit's manifest; None if it is missing or unreadable, so that the Hub is asked again."""
    try:
        saved = json.loads(_path(repository, commit).read_text(encoding="utf-8"))
        files = {name: RepositoryFile(**file) for name, file in saved["files"].items()}
        return ModelManifest(commit, saved["license"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_model_manifest(repository: Path, manifest: ModelManifest) -> None:
    write_if_possible(_path(repository, manifest.commit), json.dumps(asdict(manifest), indent=1))


def write_if_possible(path: Path, text: str) -> None:
    """Write a file of the cache, ignoring a read-only cache, as these files only save work later."""
    with suppress(OSError):
        write_text(path, text)


def _path(repository: Path, commit: str) -> Path:
    return repository / OURS / f"{commit}.json"
