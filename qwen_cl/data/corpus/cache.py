"""Cache of tokenized text.

An entry is a directory named by the hash of its inputs. It is built under a temporary name and renamed when complete,
with its manifest written last: entries without a manifest, or with other file sizes, are incomplete. No torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen_cl.config.errors import UserError
from qwen_cl.files.atomic import flush
from qwen_cl.files.cache import cache_home

FORMAT_VERSION = 1
"""Part of every entry's name: increase it when the same input gives other files."""
MANIFEST, STEM, TEXT_BYTES = "manifest.json", "corpus", "text_bytes.npy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The counts of a corpus."""

    documents: int
    tokens: int
    """Tokens, with one end-of-text per document, and BOS if the file has it."""
    blank: int
    """Blank documents of the source, which were skipped."""
    largest_id: int
    has_bos: bool = False
    """Each document begins with the tokenizer's BOS: only in datasets that the user has indexed so. Text tokenized here
    is stored without BOS, which is added on reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A tokenized text on disk; plain values."""

    prefix: str
    """Absolute prefix of Megatron's ``.bin`` and ``.idx``."""
    content: str
    """sha256 of the source's content; for a Hub dataset, of its name, commit, subset and split."""
    counts: Counts
    text_bytes_file: str | None
    """File with the UTF-8 bytes of each document's text; None if only tokens are known."""

    def text_bytes(self, documents: npt.NDArray[np.int64]) -> int | None:
        """Return the UTF-8 bytes of these documents, for bits per byte; None if not known."""
        if self.text_bytes_file is None:
            return None
        return int(np.load(self.text_bytes_file, mmap_mode="r")[documents].sum(dtype=np.int64))


def cache_directory(cache: str | None) -> Path:
    """Return the absolute path of ``data.cache``, or of the default. Raises UserError."""
    named = None if cache is None else Path(os.path.expanduser(cache)).absolute()  # noqa: PTH111 - Path's raises
    directory = named or cache_home() / "corpora"
    if os.path.lexists(directory) and not directory.is_dir():
        raise UserError(f"data.cache ({directory}) is not a directory")
    return directory


def read_entry(entry: Path, prefix: str | None) -> Corpus | None:
    """Read a cache entry; None if it is missing or incomplete. ``prefix`` is that of a user's indexed dataset."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (entry / name).stat().st_size for name in manifest["sizes"]}
        counts = Counts(**manifest["counts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if sizes != manifest["sizes"]:
        return None
    return Corpus(
        prefix=prefix or str(entry / STEM),
        content=manifest["content"],
        counts=counts,
        text_bytes_file=str(entry / TEXT_BYTES) if TEXT_BYTES in sizes else None,
    )


def write_cache_manifest(entry: Path, content: str, counts: Counts) -> None:
    """Write the manifest of an entry, after flushing all other files to disk."""
    sizes = {path.name: path.stat().st_size for path in sorted(entry.iterdir())}
    for name in sizes:
        flush(entry / name)
    manifest = {"version": FORMAT_VERSION, "content": content, "counts": asdict(counts), "sizes": sizes}
    (entry / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    flush(entry / MANIFEST)
