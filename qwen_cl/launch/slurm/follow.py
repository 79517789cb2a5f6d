"""Looking on while a submitted run goes."""

from __future__ import annotations

import re
import sys
import time

from rich.console import Console

from qwen_cl.config.override_text import printed_path
from qwen_cl.config.saved import load_config
from qwen_cl.launch.local import raise_for_status
from qwen_cl.launch.slurm.commands import SlurmUnavailable
from qwen_cl.launch.slurm.job_status import refresh
from qwen_cl.reporting.console import ProgressView, print_result, wandb_notice
from qwen_cl.runs.folder import RunFolder

PLAIN = re.compile(r"[\w./-]+")
"""What neither the shell nor Hydra reads as anything else."""
ASK_EVERY = 5
"""Seconds between questions to Slurm, which answers all users of a cluster; files are read more often."""
WHEN_SPOKEN = 1
"""Seconds, once the run has said how it ended."""
WITH_PROGRESS = ("RUNNING", "COMPLETING")
"""States of a job of which the run itself says more."""


def follow(folder: RunFolder, console: Console) -> None:
    """To the run's end. Whoever stops looking leaves the run as it is.

    Raises:
        RunFailed, RunPreempted: by the run's own record, or by Slurm's where it has none.
        KeyboardInterrupt: after saying how to go on.
    """
    try:
        _watch(folder, console)
    except KeyboardInterrupt:
        print(f"\nThe run goes on without us. {later(folder)}", file=sys.stderr)
        raise
    if notice := wandb_notice(folder.status()):
        console.print(notice, highlight=False, soft_wrap=True, markup=False)
    raise_for_status(folder, interrupted=False)
    print_result(folder, console, _seconds(folder))


def later(folder: RunFolder) -> str:
    command = f"python launch.py task=job {printed_path('task.run', folder.directory)} task.action="
    return f"To follow it: {command}follow (or status, logs, cancel)"


def _watch(folder: RunFolder, console: Console) -> None:
    """Until the job is over, too: after the run's own end it draws, or goes back into the queue."""
    queue = _Queue(folder, console)
    with ProgressView(folder, load_config(folder.config).training.max_steps, console) as view:
        while True:
            view.update()
            spoken = not folder.status().is_open
            queue.look(WHEN_SPOKEN if spoken else ASK_EVERY)
            if spoken and queue.is_over:
                return
            time.sleep(0.2)


class _Queue:
    """What Slurm says of the run's job, each time that it says something new."""

    def __init__(self, folder: RunFolder, console: Console) -> None:
        self.folder, self.console = folder, console
        self.is_over = False
        self._said = ""
        self._last = float("-inf")

    def look(self, every: float) -> None:
        if time.monotonic() < self._last + every:
            return
        self._last = time.monotonic()
        try:
            job = refresh(self.folder)
        except SlurmUnavailable as error:
            self._say(str(error))
        else:
            self.is_over = job is None
            if job is not None and job.state not in WITH_PROGRESS:
                self._say(str(job))

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _seconds(folder: RunFolder) -> float:
    """From the job's last start to its end."""
    status = folder.status()
    if status.job.start is None or status.end is None:
        return 0.0
    return (status.end - status.job.start).total_seconds()
