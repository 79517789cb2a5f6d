"""Each step of the chain is a launch of its own: what it says is ours to show, what stops us stops it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_cl.config.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, RunFailed, RunPreempted
from qwen_cl.config.overrides import quoted
from qwen_cl.config.paths import ROOT
from qwen_cl.launch.local import terminate_with_parent
from qwen_cl.launch.signals import forward_signals

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
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=terminate_with_parent)
    with forward_signals(process):
        returncode = process.wait()
    if returncode in STOPPED:
        raise RunPreempted(f"PREEMPTED in {what}; {advice}", interrupted=returncode != EXIT_PREEMPTED)
    if returncode:
        raise RunFailed(f"FAILED in {what}; {advice}")
