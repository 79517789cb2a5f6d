"""Work on several files at once that Ctrl-C can interrupt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

WORKERS = 8
"""The number of threads, as in huggingface_hub."""


def for_each(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Call ``work`` with each name from several threads; raise the first error.

    The threads are daemons, because a ThreadPoolExecutor would delay the end of the process until they are done, which
    takes minutes for large files.
    """
    waiting: SimpleQueue[str] = SimpleQueue()
    finished: SimpleQueue[BaseException | None] = SimpleQueue()
    for name in names:
        waiting.put(name)
    for _ in range(min(len(names), WORKERS)):
        threading.Thread(target=_work_through, args=(work, waiting, finished), daemon=True).start()
    try:
        for _ in names:
            if (error := finished.get()) is not None:
                raise error
    finally:
        while (_take(waiting)) is not None:  # after an error, start nothing more
            pass


def _work_through(
    work: Callable[[str], None], waiting: SimpleQueue[str], finished: SimpleQueue[BaseException | None]
) -> None:
    while (name := _take(waiting)) is not None:
        try:
            work(name)
        except BaseException as error:  # raised again in the calling thread
            finished.put(error)
        else:
            finished.put(None)


def _take(waiting: SimpleQueue[str]) -> str | None:
    try:
        return waiting.get_nowait()
    except Empty:
        return None
