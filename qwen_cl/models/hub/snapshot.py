"""One commit of a repository in the Hub's cache: the files that training needs, and their verification."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from qwen_cl.config.errors import UserError
from qwen_cl.files.hashing import hash_file
from qwen_cl.files.parallel import for_each
from qwen_cl.models.formats.tensor_files import ADAPTER_CONFIG, INDEX, SINGLE, indexed_files, no_weights, weights_entry
from qwen_cl.models.hub.manifest import DIGEST, OURS, ModelManifest, write_if_possible
from qwen_cl.models.tokenizer.files import TEMPLATES

JINJA = "*.jinja"
FILES = (
    JINJA,
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""The files that training reads besides the weights; code of the repository is never among them."""
TOKENIZERS: tuple[set[str], ...] = ({"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"})
LONG = 2**30
"""Bytes from which hashing is announced if no progress bar can be drawn."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    reference: str
    """The reference that the user gave, for messages: ``hf://ORG/NAME[@REVISION]``."""
    repo: str
    commit: str
    cache: Path
    manifest: ModelManifest | None
    """The files of the commit; None if other tools filled the cache and the Hub was not asked."""

    @property
    def repository(self) -> Path:
        return self.cache / f"models--{self.repo.replace('/', '--')}"

    @property
    def directory(self) -> Path:
        return self.repository / "snapshots" / self.commit

    @property
    def names(self) -> set[str]:
        """Return the names of the commit's files; without a manifest, of those in the cache."""
        if self.manifest is not None:
            return set(self.manifest.files)
        if not self.directory.is_dir():
            return set()
        found = [*self.directory.iterdir(), *self.directory.glob(f"{TEMPLATES}/*.jinja")]
        return {str(path.relative_to(self.directory)) for path in found}

    def blob(self, name: str) -> Path:
        """Return the file with the content: the target of the snapshot's link, or the entry itself without links."""
        path = self.directory / name
        return Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path

    def digest(self, name: str) -> str | None:
        """Return the expected hash of a file; without a manifest, the name of its blob in huggingface_hub's cache."""
        if self.manifest is not None:
            return self.manifest.files[name].digest
        blob = self.blob(name)
        return blob.name if blob.parent.name == "blobs" and DIGEST.fullmatch(blob.name) else None

    def size(self, name: str) -> int | None:
        return self.manifest.files[name].size if self.manifest is not None else None


def needed_files(snapshot: Snapshot, *, weights: bool, trusted: Callable[[str], bool]) -> list[str]:
    """Return the files that training needs, including those that the index lists once it is ``trusted``.

    Raises:
        UserError: The commit lacks a required file, or its index names a file that is not supported.
    """
    names = snapshot.names
    needed = sorted(name for name in names if _is_small_file(name))
    _require_a_model(snapshot, names)
    if not weights:
        return needed
    entry = weights_entry(names)
    if entry is None:
        raise UserError(
            f"model.source ({snapshot.reference}): the cache ({snapshot.cache}) holds neither {SINGLE} nor {INDEX} of "
            f"commit {snapshot.commit[:12]}; connect once to fetch them, or write model=local model.source=DIRECTORY"
        )
    needed.append(entry)
    if entry == INDEX and trusted(INDEX):
        needed += indexed_files(snapshot.directory / INDEX)
        if snapshot.manifest is not None and (absent := sorted(set(needed) - names)):
            raise UserError(
                f"model.source ({snapshot.reference}): {INDEX} names {absent[0]}, which the commit does not hold"
            )
    return needed


def _is_small_file(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return any(fnmatchcase(file, pattern) for pattern in FILES if not folder or (folder, pattern) == (TEMPLATES, JINJA))


def _require_a_model(snapshot: Snapshot, names: set[str]) -> None:
    where = f"model.source ({snapshot.reference}): commit {snapshot.commit[:12]}"
    if snapshot.manifest is None:
        where += f" in the cache ({snapshot.cache})"
    top = {name for name in names if "/" not in name}
    if "config.json" not in names:
        if (weights_entry(top) is None and top & {ADAPTER_CONFIG}) or any(name.endswith(".gguf") for name in top):
            raise UserError(f"{where} {no_weights(top)}")
        raise UserError(f"{where} holds no config.json; a model in Hugging Face layout has one")
    if snapshot.manifest is not None and weights_entry(top) is None:
        raise UserError(f"{where} {no_weights(top)}")
    if not any(tokenizer <= names for tokenizer in TOKENIZERS):
        raise UserError(f"{where} holds no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)")


def is_verified(snapshot: Snapshot, name: str) -> bool:
    """Return whether the file was verified and has not been written to since."""
    try:
        stamp = _stamp(snapshot.directory / name)
        digest = snapshot.digest(name)
        return digest is not None and _record(snapshot, digest).read_text(encoding="utf-8") == stamp
    except OSError:
        return False


def damaged_files(snapshot: Snapshot, names: list[str]) -> list[str]:
    """Return the files with another hash than expected; each is hashed once, and the result recorded."""
    from huggingface_hub.utils import tqdm

    unknown = [name for name in names if not is_verified(snapshot, name)]
    total = sum((snapshot.directory / name).stat().st_size for name in unknown)
    if total > LONG and not sys.stderr.isatty():
        print(f"Verifying {decimal(total)} of {snapshot.reference}, once", file=sys.stderr, flush=True)
    damaged = []
    with tqdm(total=total, desc="Verifying", unit="B", unit_scale=True, delay=1, disable=None, leave=False) as bar:

        def check(name: str) -> None:
            path, digest = snapshot.directory / name, snapshot.digest(name)
            stamp = _stamp(path)
            if digest is None:
                sound = snapshot.size(name) in (None, path.stat().st_size)
            else:
                sound = _hash(path, digest, bar) == digest
            if not sound:
                damaged.append(name)
            elif digest is not None:
                write_if_possible(_record(snapshot, digest), stamp)

        for_each(check, unknown)
    return sorted(damaged)


def remove(snapshot: Snapshot, name: str) -> None:
    """Remove a file from the cache, but never a file outside it that an entry links to."""
    blob = snapshot.blob(name)
    if snapshot.repository in blob.parents:
        blob.unlink(missing_ok=True)
    (snapshot.directory / name).unlink(missing_ok=True)


def _hash(path: Path, like: str, bar: Any) -> str:
    """Return the hash of a file, by git-lfs or git according to the length of ``like``."""
    content = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    try:
        return hash_file(path, content, bar.update)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from error


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _record(snapshot: Snapshot, digest: str) -> Path:
    """Return the record of a verified blob, one small file each, so that concurrent processes do not conflict."""
    return snapshot.repository / OURS / "verified" / digest
