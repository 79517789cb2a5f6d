"""What a launcher prints while its run goes on: if nobody can read it any more, the run still does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def tolerate_broken_output(directory: Path) -> Iterator[None]:
    """A reader that went away (``| head``) or a full disk under ``> file`` would end the launcher, and with it hours of
    training. In here it is said once, where that can still be read, and the rest is not printed. ``directory`` has what
    happens all the same."""
    before = sys.stdout, sys.stderr
    told = f"what is printed cannot be written any more ({{}}); what runs goes on, and {directory} has its records"
    sys.stdout, sys.stderr = (_Enduring(stream, told) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Enduring:
    def __init__(self, stream: Any, told: str) -> None:
        self._stream, self._told = stream, told

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """What is in its buffer, and what follows, goes nowhere."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        print(self._told.format(error.strerror), file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
