"""Follow a submitted run."""

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
"""Text that neither the shell nor Hydra interprets."""
QUERY_SECONDS = 5
"""Seconds between queries to Slurm, which serves all users of a cluster; files are read more often."""
QUERY_SECONDS_AT_END = 1
"""Seconds between queries once the run has recorded its final status."""
WITH_PROGRESS = ("RUNNING", "COMPLETING")
"""States of a job whose run reports its own progress."""


def follow(folder: RunFolder, console: Console) -> None:
    """Show a submitted run until its end. An interrupted view leaves the run as it is.

    Raises:
        RunFailed, RunPreempted: by the run's final status, or by Slurm's if the run recorded none.
        KeyboardInterrupt: after printing how to follow the run again.
    """
    try:
        _watch(folder, console)
    except KeyboardInterrupt:
        print(f"\nThe run continues in the cluster. {follow_hint(folder)}", file=sys.stderr)
        raise
    if notice := wandb_notice(folder.status()):
        console.print(notice, highlight=False, soft_wrap=True, markup=False)
    raise_for_status(folder, interrupted=False)
    print_result(folder, console, _seconds(folder))


def follow_hint(folder: RunFolder) -> str:
    """Return the command that follows a submitted run."""
    command = f"python launch.py task=job {printed_path('task.run', folder.directory)} task.action="
    return f"To follow it: {command}follow (or status, logs, cancel)"


def _watch(folder: RunFolder, console: Console) -> None:
    """Show progress until the job is over: after the run's end the job draws the report, or is requeued."""
    job = _JobView(folder, console)
    with ProgressView(folder, load_config(folder.config).training.max_steps, console) as view:
        while True:
            view.update()
            ended = not folder.status().is_open
            job.update(QUERY_SECONDS_AT_END if ended else QUERY_SECONDS)
            if ended and job.is_over:
                return
            time.sleep(0.2)


class _JobView:
    """The state of the run's job in Slurm, printed whenever it changes."""

    def __init__(self, folder: RunFolder, console: Console) -> None:
        self.folder, self.console = folder, console
        self.is_over = False
        self._printed = ""
        self._last = float("-inf")

    def update(self, every: float) -> None:
        if time.monotonic() < self._last + every:
            return
        self._last = time.monotonic()
        try:
            job = refresh(self.folder)
        except SlurmUnavailable as error:
            self._print(str(error))
        else:
            self.is_over = job is None
            if job is not None and job.state not in WITH_PROGRESS:
                self._print(str(job))

    def _print(self, text: str) -> None:
        if text != self._printed:
            self._printed = text
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _seconds(folder: RunFolder) -> float:
    """Return the seconds from the job's last start to its end."""
    status = folder.status()
    if status.job.start is None or status.end is None:
        return 0.0
    return (status.end - status.job.start).total_seconds()
