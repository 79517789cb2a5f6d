"""Several files at once, without making Ctrl-C wait for the last byte of any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

WORKERS = 8
"""As many as huggingface_hub downloads at once."""


def for_each(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Call ``work`` with each name, from several threads; raise what the first that failed raised.

    A ThreadPoolExecutor would hold up the end of the process until its threads are done, which for a file of many
    gigabytes is minutes: these are daemons.
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
        except BaseException as error:  # whatever it was, the caller must hear of it
            finished.put(error)
        else:
            finished.put(None)


def _take(waiting: SimpleQueue[str]) -> str | None:
    try:
        return waiting.get_nowait()
    except Empty:
        return None
