"""What one commit of a repository holds, kept beside it in the Hub's cache.

Without it nobody can say later, offline, whether a cached snapshot is whole, or what a file's content should be.
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
"""Our folder in a repository's folder of the cache; huggingface_hub leaves it alone."""


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    size: int | None
    """Bytes; None where the endpoint does not say."""
    digest: str | None
    """sha256 of the content (64 hex) of a file in LFS, git's blob id (40 hex) of any other, None if not said."""


@dataclass(frozen=True, slots=True)
class ModelManifest:
    commit: str
    license: str | None
    """As the model's card says it."""
    files: dict[str, RepositoryFile]
    """Every file of the commit by its path in the repository."""


def from_hub(info: Any) -> ModelManifest:
    """``info`` is huggingface_hub's ModelInfo, asked for with ``files_metadata``."""
    files = {}
    for file in info.siblings or []:
        digest = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
        size = file.lfs.size if file.lfs else file.size
        files[file.rfilename] = RepositoryFile(size, digest if DIGEST.fullmatch(digest) else None)
    license = getattr(info.card_data, "license", None)
    return ModelManifest(info.sha, license if isinstance(license, str) else None, files)


def read_manifest(repository: Path, commit: str) -> ModelManifest | None:
    """None where there is none that can be read: the Hub is asked again, or the snapshot judged by its files."""
    try:
        saved = json.loads(_path(repository, commit).read_text(encoding="utf-8"))
        files = {name: RepositoryFile(**file) for name, file in saved["files"].items()}
        return ModelManifest(commit, saved["license"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_model_manifest(repository: Path, manifest: ModelManifest) -> None:
    write_if_possible(_path(repository, manifest.commit), json.dumps(asdict(manifest), indent=1))


def write_if_possible(path: Path, text: str) -> None:
    """Write a file of the cache, and pass over a cache that is read-only: what is kept here only saves work later."""
    with suppress(OSError):
        write_text(path, text)


def _path(repository: Path, commit: str) -> Path:
    return repository / OURS / f"{commit}.json"
