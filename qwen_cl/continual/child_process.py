"""The launcher as a child process: each stage, evaluation and export of task=continual is one."""

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
"""Exit codes of a launcher that got a signal; the negative ones are of a signal before it installed its handlers."""


def launch(description: str, directory: Path, overrides: Sequence[str], advice: str) -> None:
    """Run ``python launch.py hydra.run.dir=DIRECTORY OVERRIDES`` to its end; its output goes to this terminal.

    Raises:
        RunPreempted: it, or this process, got a signal to stop.
        RunFailed: it failed; its own message is on the terminal.
    """
    command = [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir={quoted(str(directory))}", *overrides]
    sys.stdout.flush()
    # In a new session: Ctrl-C would otherwise reach it twice, from the terminal and from here, and the second kills it.
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=terminate_with_parent)
    with forward_signals(process):
        returncode = process.wait()
    if returncode in STOPPED:
        raise RunPreempted(f"PREEMPTED in {description}; {advice}", interrupted=returncode != EXIT_PREEMPTED)
    if returncode:
        raise RunFailed(f"FAILED in {description}; {advice}")
