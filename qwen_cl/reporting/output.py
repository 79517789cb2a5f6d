"""Output streams that may break without ending the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def tolerate_broken_output(directory: Path) -> Iterator[None]:
    """Keep the launcher running if its output breaks, as with ``| head`` or a full disk under ``> file``.

    The failure is reported once on stderr, and further output is dropped. ``directory`` has the records of the run.
    """
    before = sys.stdout, sys.stderr
    message = f"output cannot be written any more ({{}}); the run continues, and its records are in {directory}"
    sys.stdout, sys.stderr = (_TolerantStream(stream, message) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _TolerantStream:
    def __init__(self, stream: Any, message: str) -> None:
        self._stream, self._message = stream, message

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._redirect(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._redirect(error)

    def _redirect(self, error: OSError) -> None:
        """Send the stream's buffer and all further output to the null device."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        print(self._message.format(error.strerror), file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
