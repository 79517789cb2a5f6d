"""Tokenization in parallel processes, in order. No torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from qwen_cl.data.corpus.documents import Document

BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**19, 1024
PATIENCE = 2.0
"""Seconds within which the pool normally notices that a worker was killed."""
AHEAD = 3
"""Batches in flight per process: enough to keep it busy, few enough to hold in memory."""


@dataclass(frozen=True, slots=True)
class TextBatch:
    """The tokens of a batch of documents."""

    ids: npt.NDArray[np.int32]
    """Ids of all documents, each followed by the end-of-text id."""
    lengths: npt.NDArray[np.int64]
    """Ids of each document, end-of-text included."""
    text_bytes: npt.NDArray[np.int64]
    """UTF-8 bytes of each document."""


class PoolStuck(BrokenProcessPool):
    """An error for a pool whose thread waits forever, so that Python could not exit."""


def tokenize(
    documents: Iterable[Document], tokenizer: str, eos_id: int, workers: int
) -> Generator[tuple[TextBatch, list[Document]], None, None]:
    """Tokenize documents, none of which is blank; ``tokenizer`` is the text of a tokenizer.json.

    Raises:
        BrokenProcessPool: a worker was killed.
    """
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(tokenizer, eos_id)
    )
    under_way: deque[tuple[Future[TextBatch], list[Document]]] = deque()
    processes = pool._processes  # the only list that includes processes which died at once
    try:
        for batch in _batches(documents):
            under_way.append((pool.submit(encode_texts, [document.text for document in batch]), batch))
            if len(under_way) > AHEAD * workers:
                future, done = under_way.popleft()
                yield _result(future, processes), done
        while under_way:
            future, done = under_way.popleft()
            yield _result(future, processes), done
    except PoolStuck:
        for process in list(processes.values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _result(future: Future[TextBatch], processes: Mapping[int, BaseProcess]) -> TextBatch:
    """Return a result, and raise PoolStuck if a worker was killed while sending it: the pool itself would wait forever
    for the rest."""
    while True:
        lost = any(not process.is_alive() for process in list(processes.values()))
        try:
            return future.result(timeout=PATIENCE)
        except TimeoutError:
            if lost and not future.done():
                raise PoolStuck("a worker was killed while sending its result") from None


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Worker:
    """The state of a worker process."""

    tokenizer: Tokenizer
    eos_id: int


def _start(tokenizer: str, eos_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the builder ends its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.tokenizer, _Worker.eos_id = Tokenizer.from_str(tokenizer), eos_id
    _Worker.tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is encoded as text


def _end_with_parent() -> None:
    """Exit when the parent process ends; a worker of a pool would otherwise wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_texts(texts: list[str]) -> TextBatch:
    encodings = _Worker.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = [np.array([*encoding.ids, _Worker.eos_id], dtype=np.int32) for encoding in encodings]
    return TextBatch(
        np.concatenate(ids),
        np.array([len(document) for document in ids], dtype=np.int64),
        np.array([len(text.encode()) for text in texts], dtype=np.int64),
    )
