"""Local copies of Hub datasets: every row and column of one split at one commit, in JSON Lines.

The processes of a run read the copy, possibly on another node and without a network. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock

from qwen_cl.config.data import TEXT
from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.data.corpus.hub_dataset import COMMIT, is_hub_dataset, parse_reference, pin, read_hub_records
from qwen_cl.data.corpus.hub_revisions import recall, remember
from qwen_cl.data.corpus.parquet_records import without_nulls
from qwen_cl.data.corpus.record import Record
from qwen_cl.files.cache import cache_home

SPLIT = "train"
"""The default split."""


def pin_dataset(path: str, key: str, *, split: str = SPLIT, subset: str | None = None) -> str:
    """Return the reference with its commit, subset and split, after making a local copy of it.

    ``split`` and ``subset`` are the defaults for a reference that names none.

    Raises:
        UserError: the dataset cannot be read, or the cache cannot be written to.
    """
    reference = parse_reference(path, key)
    if subset is not None and reference.subset not in (None, subset):
        raise UserError(f"{key} ({path}) and data.subset ({subset}) name two subsets; remove one")
    source = TextSource(
        key=key,
        path=reference.bare,
        text_field=TEXT,
        split=reference.split or split,
        subset=reference.subset or subset,
    )
    root = cache_home() / "datasets"
    if (
        COMMIT.fullmatch(reference.revision or "")
        and copy_of(pinned := _pinned(source, str(reference.revision))).exists()
    ):
        return pinned
    commit = recall(root, source) or pin(source)
    pinned = _pinned(source, commit)
    _make_copy(copy_of(pinned), source, commit)
    remember(root, source, commit)
    return pinned


def reuse_commit(requested: str, previous: str) -> str:
    """Return the pinned ``previous`` if ``requested`` is the same dataset without a revision; else ``requested``."""
    if not (is_hub_dataset(requested) and is_hub_dataset(previous)):
        return requested
    now, before = parse_reference(requested, "data.path"), parse_reference(previous, "data.path")
    same = now.revision is None and now.repository == before.repository
    same = same and now.split in (None, before.split) and now.subset in (None, before.subset)
    return previous if same else requested


def copy_of(pinned: str) -> Path:
    """Return the path of the local copy of a reference that :func:`pin_dataset` returned."""
    reference = parse_reference(pinned, "data.path")
    assert reference.split is not None and reference.revision is not None
    name = f"{quote(reference.subset or 'default', safe='')}.{quote(reference.split, safe='')}.jsonl"
    return cache_home() / "datasets" / reference.repository.replace("/", "--") / reference.revision / name


def _pinned(source: TextSource, commit: str) -> str:
    subset = f"{source.subset}/" if source.subset else ""
    return f"{source.path.partition('@')[0]}@{commit}#{subset}{source.split}"


def _make_copy(file: Path, source: TextSource, commit: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # another run may be fetching the same
            if not file.exists():
                unfinished = file.with_suffix(".unfinished")
                with unfinished.open("w", encoding="utf-8") as stream:
                    stream.writelines(_lines(read_hub_records(source, commit)))
                unfinished.replace(file)
    except OSError as error:
        raise UserError(
            f"{source.key}: {file.parent} cannot be written to: {error.strerror or error}; set QWEN_CL_CACHE to "
            "another place"
        ) from error


def _lines(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        fields = plain_json(without_nulls(dict(record.fields)))
        yield json.dumps(fields, ensure_ascii=False) + "\n"


def plain_json(value: Any) -> Any:
    """Return the value as JSON types. Other types (bytes, images, dates) become an object that names the type, so that
    they are never read as text."""
    if isinstance(value, dict):
        return {str(name): plain_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else {"not_text": type(value).__name__}
