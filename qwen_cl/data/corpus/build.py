"""Builder of cache entries: one process at a time, each entry complete or absent. Needs megatron-core."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.cache import STEM, TEXT_BYTES, Counts, read_entry, write_cache_manifest
from qwen_cl.data.corpus.documents import Document, read_files
from qwen_cl.data.corpus.files import find_files, stamps
from qwen_cl.data.corpus.hub_dataset import read_hub_dataset
from qwen_cl.data.corpus.prepare import BuildRequest
from qwen_cl.data.corpus.tokenizer_pool import tokenize
from qwen_cl.data.raw_text import Delimiters


def build(request: BuildRequest) -> None:
    """Build the requested entry, unless another process builds it meanwhile.

    Raises:
        UserError: the source is invalid, or the cache cannot be written to.
        BrokenProcessPool: a worker was killed.
    """
    entry, console = Path(request.entry), Console(stderr=True)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry, console):
            if read_entry(entry, request.known.prefix) is None:
                _build_entry(request, entry, console)
    except OSError as error:
        raise UserError(
            f"data.cache ({entry.parent}) cannot be written to: {error.strerror or error}; free space there, or name "
            "another directory"
        ) from error


@contextmanager
def _locked(entry: Path, console: Console) -> Iterator[None]:
    """Hold the lock of an entry. The kernel releases it if the process dies."""
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print("Another run is tokenizing this text; waiting for it", highlight=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build_entry(request: BuildRequest, entry: Path, console: Console) -> None:
    unfinished = entry.with_name(f"{entry.name}.unfinished")
    for leftover in (unfinished, entry):  # of a killed builder, or an incomplete entry
        if leftover.exists():
            shutil.rmtree(leftover)
    unfinished.mkdir()
    try:
        if request.known.prefix is not None:
            from qwen_cl.data.corpus.indexed import check_indexed

            counts = check_indexed(request.known.prefix, Delimiters(request.bos_id, request.eos_id), request.source)
        else:
            counts = _tokenize_into(unfinished, request, console)
        write_cache_manifest(unfinished, request.known.content, counts)
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tokenize_into(directory: Path, request: BuildRequest, console: Console) -> Counts:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(directory / f"{STEM}.bin"), _dtype(request))
    reading, text_bytes = _Reading(request), []
    documents = tokens = largest = 0
    started = time.monotonic()
    with (
        builder.data_file,
        _bar(console) as bar,
        closing(tokenize(reading.documents(), request.tokenizer, request.eos_id, request.workers)) as batches,
    ):
        task = bar.add_task("Tokenizing", total=reading.total, documents=0, tokens=0)
        if not console.is_terminal:
            console.print(f"Tokenizing {request.source.path}", highlight=False, markup=False, soft_wrap=True)
        for batch, read in batches:
            for ids in np.split(batch.ids, np.cumsum(batch.lengths)[:-1]):
                builder.add_document(ids, [len(ids)])
            documents, tokens = documents + len(read), tokens + len(batch.ids)
            largest = max(largest, int(batch.ids.max()))
            text_bytes.append(batch.text_bytes)
            bar.update(task, completed=read[-1].progress, documents=documents, tokens=tokens)
        if not documents:
            raise UserError(
                f"{request.source.key} ({request.source.path}) has no text to train on; name another source"
            )
        builder.finalize(str(directory / f"{STEM}.idx"))
    np.save(directory / TEXT_BYTES, np.concatenate(text_bytes))
    left_out = f", {reading.blank:,} blank documents skipped" if reading.blank else ""
    seconds = time.monotonic() - started
    console.print(f"{documents:,} documents, {tokens:,} tokens{left_out}; {seconds:.0f} s", highlight=False)
    return Counts(documents=documents, tokens=tokens, blank=reading.blank, largest_id=largest)


def _dtype(request: BuildRequest) -> type[np.number[Any]]:
    """Return the narrowest of Megatron's dtypes that holds every id."""
    from megatron.core.datasets.indexed_dataset import DType

    vocabulary = Tokenizer.from_str(request.tokenizer).get_vocab(with_added_tokens=True)
    return DType.optimal_dtype(max(*vocabulary.values(), request.eos_id) + 1)


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class _Reading:
    """The reader of a source's documents; it skips and counts blank ones."""

    def __init__(self, request: BuildRequest) -> None:
        self.source, self.known = request.source, request.known
        self.files = [] if self.known.commit else find_files(self.source.path, self.source.key)
        self.total = sum(file.size for file in self.files) or None
        self.blank = 0

    def documents(self) -> Iterator[Document]:
        for document in self._everything():
            if document.text:
                yield document
            else:
                self.blank += 1
        # The entry is named by the content of the files at the time of hashing.
        if self.known.commit is None and stamps(find_files(self.source.path, self.source.key)) != self.known.stamps:
            raise UserError(
                f"{self.source.key} ({self.source.path}) changed while it was read; run the command "
                "again when the files are complete"
            )

    def _everything(self) -> Iterator[Document]:
        if self.known.commit is None:
            return read_files(self.files, self.source.text_field, self.source.separator)
        return read_hub_dataset(self.source, self.known.commit)
