"""Where tokenized text is kept, and when an entry counts.

An entry is a directory named by what went into it. It is built under another name and renamed when whole, its manifest
written last: without a manifest, or with files of another size than it says, it does not count. No torch.
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
"""Part of every entry's name: raise it when the same input would be written otherwise."""
MANIFEST, STEM, TEXT_BYTES = "manifest.json", "corpus", "text_bytes.npy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    documents: int
    tokens: int
    """With one end-of-text a document, and BOS where the file has it."""
    blank: int
    """Documents of the source that held no text, and were left out."""
    largest_id: int
    has_bos: bool = False
    """Each document begins with the tokenizer's BOS: only where the user has indexed it so. What is tokenized here is
    kept without, and begins with it when it is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Tokenized text on disk; plain values."""

    prefix: str
    """Of Megatron's ``.bin`` and ``.idx``; absolute."""
    content: str
    """sha256 of the source's content; of a dataset on the Hub, of its name, commit, subset and split."""
    counts: Counts
    text_bytes_file: str | None
    """Bytes of each document's text in UTF-8, without its end-of-text; None where only tokens are known."""

    def text_bytes(self, documents: npt.NDArray[np.int64]) -> int | None:
        """UTF-8 bytes of the text of these documents, for bits per byte; None where they are not known."""
        if self.text_bytes_file is None:
            return None
        return int(np.load(self.text_bytes_file, mmap_mode="r")[documents].sum(dtype=np.int64))


def cache_directory(cache: str | None) -> Path:
    """``data.cache``, or what stands for it; absolute."""
    named = None if cache is None else Path(os.path.expanduser(cache)).absolute()  # noqa: PTH111 - Path's raises
    directory = named or cache_home() / "corpora"
    if os.path.lexists(directory) and not directory.is_dir():
        raise UserError(f"data.cache ({directory}) is not a directory")
    return directory


def read_entry(entry: Path, prefix: str | None) -> Corpus | None:
    """None where there is none that is whole. ``prefix`` is that of a dataset that the user has indexed before."""
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
    """Last, when all other files are on disk."""
    sizes = {path.name: path.stat().st_size for path in sorted(entry.iterdir())}
    for name in sizes:
        flush(entry / name)
    manifest = {"version": FORMAT_VERSION, "content": content, "counts": asdict(counts), "sizes": sizes}
    (entry / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    flush(entry / MANIFEST)
