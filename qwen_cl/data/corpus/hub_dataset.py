"""Datasets of the Hugging Face Hub: pinned to a commit, streamed, and offline from the cache of ``datasets``.

No torch: ``datasets`` imports none by itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.documents import Document, TextSource, to_document
from qwen_cl.data.corpus.record import Record
from qwen_cl.models.hub.http_errors import request_errors

SCHEME = "hf://datasets/"
REFERENCE = re.compile(
    rf"{SCHEME}(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w-][\w.-]*(?:/[\w-][\w.-]*)*))?"
    r"(?:#(?:(?P<subset>[^/#]+)/)?(?P<split>[^/#]+))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A parsed reference to a Hub dataset."""

    repository: str
    revision: str | None
    subset: str | None
    split: str | None

    @property
    def bare(self) -> str:
        """Return the reference without subset and split."""
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def parse_reference(path: str, key: str) -> HubReference:
    match = REFERENCE.fullmatch(path)
    if match is None:
        raise UserError(
            f"{key} ({path}) must read hf://datasets/ORG/NAME, optionally with @REVISION and #SPLIT or "
            "#SUBSET/SPLIT after it"
        )
    return HubReference(**match.groupdict())


def is_hub_dataset(path: str) -> bool:
    return path.startswith("hf://")


def pin(source: TextSource) -> str:
    """Return the current commit of the reference; offline, the one in the cache.

    Raises:
        UserError: the reference is malformed, or the dataset can neither be reached nor is in the cache.
    """
    with _explained(source):
        return str(_builder(source, None).hash)


def read_hub_dataset(source: TextSource, commit: str) -> Iterator[Document]:
    """Yield the documents of a Hub dataset. Raises UserError also if a row has no text."""
    return map(functools.partial(to_document, field=source.text_field), read_hub_records(source, commit))


def read_hub_records(source: TextSource, commit: str) -> Iterator[Record]:
    """Stream the rows of a Hub dataset in order.

    Raises:
        UserError: the dataset cannot be read, or the offline cache holds another commit.
    """
    with _explained(source):
        builder = _builder(source, commit)
        if builder.hash != commit:
            raise UserError(
                f"{source.key} ({source.path}): the cache holds commit {builder.hash[:12]}, not {commit[:12]}; "
                "connect once to fetch it (unset HF_HUB_OFFLINE)"
            )
        rows = iter(builder.as_streaming_dataset(split=source.split))
    number = 0
    while True:
        number += 1
        with _explained(source):
            row = next(rows, None)
        if row is None:
            return
        yield Record(row, f"{source.path}: row {number}", number)


def _builder(source: TextSource, commit: str | None) -> Any:
    import datasets

    reference = parse_reference(source.path, source.key)
    datasets.logging.set_verbosity_error()  # no warning that the cache is used, which is expected offline
    revision = commit or reference.revision
    builder = datasets.load_dataset_builder(reference.repository, source.subset, revision=revision)
    if commit is None and COMMIT.fullmatch(revision or "") and builder.hash != revision:
        raise UserError(
            f"{source.key} ({source.path}): the cache holds commit {builder.hash[:12]} of it; connect once to fetch "
            "the other (unset HF_HUB_OFFLINE)"
        )
    return builder


@contextmanager
def _explained(source: TextSource) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except request_errors(OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "Config name is missing" in reason or "multiple" in reason:
            fix = f"name one of them after a #, as in {source.path}#SUBSET/{source.split}"
            fix = "set data.subset to one of them" if source.key.startswith("data.") else fix
        elif "Bad split" in reason:
            fix = f"name one of them after a #, as in {source.path}#test"
        else:
            fix = "check its name, the network (HF_HUB_OFFLINE=1 reads the cache) and, if private, `hf auth login`"
        raise UserError(f"{source.key} ({source.path}) cannot be read: {reason.rstrip('.')}; {fix}") from error
