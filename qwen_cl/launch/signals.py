"""Handle signals to this process for a while, or forward them to a child that does the work."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a stop request of a scheduler, and a closed terminal."""


@contextmanager
def handle_signals(
    handler: Callable[[int, Any], object], signals: Iterable[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Call ``handler`` with the number and the frame of each of these signals, and restore the previous handlers
    after."""
    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def forward_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Forward stop signals to a child in another session, which the terminal does not reach."""
    with handle_signals(lambda number, frame: process.send_signal(number)):
        yield
