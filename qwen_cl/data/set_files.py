"""Files of named sets: their rows with FILE:LINE, and their hash. No torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qwen_cl.config.data import TEXT
from qwen_cl.config.errors import UserError
from qwen_cl.config.renamed_keys import earlier_names
from qwen_cl.data.chat.conversations import check_text
from qwen_cl.data.corpus.documents import read_records
from qwen_cl.data.corpus.files import Format, find_files, hash_files
from qwen_cl.data.corpus.hub_dataset import is_hub_dataset
from qwen_cl.data.corpus.record import Record
from qwen_cl.data.fields import has_conversation, missing_field_error
from qwen_cl.data.hub_copy import copy_of, pin_dataset
from qwen_cl.data.rows import Row, Text, conversations
from qwen_cl.files.hashing import hash_file

PLACES = "or hf://datasets/ORG/NAME"


def local_path(path: str, key: str) -> str:
    """Return an absolute path, which may contain a glob; for a Hub dataset, that of its copy in the cache. Messages
    name ``key``.

    Raises:
        UserError: the dataset cannot be read, or the cache cannot be written to.
    """
    if is_hub_dataset(path):
        return str(copy_of(pin_dataset(path, key)))
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - Path's raises on an unknown user


def read_set_rows(path: str, key: str) -> tuple[list[Row], list[str]]:
    """Read the rows of a set, all of the kind of the first, and the FILE:LINE of each.

    Raises:
        UserError: names file and line of the first invalid row.
    """
    files = find_files(local_path(path, key), key, PLACES)
    text_files = {str(file.path) for file in files if file.format is Format.text}
    records = read_records(files, None)
    first = next(records, None)
    if first is None:
        raise UserError(f"{path} is empty; it must hold rows, or a text (or set {key} to another)")
    records, places = _noting_places(itertools.chain([first], records))
    if first.fields.get(TEXT) is not None and has_conversation(first.fields):
        raise UserError(
            f"{first.where}: the row has a text and a conversation (found: {', '.join(map(repr, first.fields))}), and "
            "a set is one of them; remove the fields of the other"
        )
    if TEXT in first.fields and not has_conversation(first.fields):
        return [_text(record, record.where in text_files) for record in records], places
    return list(conversations(records, {}, path)), places


def _noting_places(records: Iterable[Record]) -> tuple[Iterator[Record], list[str]]:
    """Return the records and a list that fills with their FILE:LINE while they are read."""
    places: list[str] = []

    def noting() -> Iterator[Record]:
        for record in records:
            places.append(record.where)
            yield record

    return noting(), places


def set_hash(path: str, key: str) -> str:
    """Return the sha256 of a set's file; of several files, over all of them in the order of their names.

    Raises:
        UserError: the files do not exist.
    """
    paths = [file.path for file in find_files(local_path(path, key), key, PLACES)]
    return hash_files(paths) if len(paths) > 1 else hash_file(paths[0])


def with_set_hashes(target: str, sets: Mapping[str, Mapping[str, str]], chat: Mapping[str, Any] | None = None) -> str:
    """Return the hash that identifies a run's data.

    It is ``target``, the hash of the data's own files, if nothing is replayed and no retention set is given; otherwise
    sha256 over all of it. ``sets`` has, by key (``replay.datasets``), the path of each by name: their content and names
    are hashed, not their paths, and the keys under their first names. ``chat``: the settings of how conversations are
    rendered, if there are any.
    """
    found: dict[str, Any] = {
        key: {name: set_hash(path, f"{key}.{name}") for name, path in files.items()}
        for key, files in sets.items()
        if files
    }
    if chat:
        found["chat"] = dict(chat)
    if not found:
        return target
    return hashlib.sha256(json.dumps({"target": target, **earlier_names(found)}, sort_keys=True).encode()).hexdigest()


def _text(record: Record, whole_file: bool) -> Text:
    if TEXT not in record.fields:
        fix = "every row of a set must have it where the first has"
        raise missing_field_error(record.fields, TEXT, record.where, fix)
    name = "the text" if whole_file else f"field {TEXT!r}"
    return Text(check_text(record.fields[TEXT], name, record.where))
