"""Each step of the chain is a launch of its own: what it says is ours to show, what stops us stops it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, RunFailed, RunPreempted
from qwen_cl.config.rules import quoted
from qwen_cl.execute import ROOT, die_with_parent

STOPPED = (EXIT_INTERRUPTED, EXIT_PREEMPTED, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
"""What a launch ends with that was asked to stop; before it listens, the signal itself ends it."""


def launch(what: str, directory: Path, overrides: Sequence[str], advice: str) -> None:
    """``python launch.py hydra.run.dir=DIRECTORY OVERRIDES`` to its end.

    Raises:
        RunPreempted: it, or this process, was asked to stop.
        RunFailed: it ended in any other way but well; its own message is on the terminal.
    """
    command = [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir={quoted(str(directory))}", *overrides]
    sys.stdout.flush()
    # A session of its own: a Ctrl-C would reach it twice, from the terminal and from us, and twice kills it.
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
    with _passing_on_signals(process):
        returncode = process.wait()
    if returncode in STOPPED:
        raise RunPreempted(f"PREEMPTED in {what}; {advice}", interrupted=returncode != EXIT_PREEMPTED)
    if returncode:
        raise RunFailed(f"FAILED in {what}; {advice}")


@contextmanager
def _passing_on_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, frame: Any) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
