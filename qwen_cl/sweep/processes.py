"""Trials as processes on this machine: started, stopped, and found again after their sweep was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from qwen_cl.config.data import ChatDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.overrides import override_key, quoted
from qwen_cl.config.paths import ROOT
from qwen_cl.launch.local import STOP_GRACE, terminate_with_parent
from qwen_cl.reporting.tracking.identity import SWEEP, TRIAL_NAME
from qwen_cl.runs.status import State
from qwen_cl.sweep.slots import Slot
from qwen_cl.sweep.trial import Trial

LOG = "launch.log"
"""The file in a trial's folder with the launcher's output."""
TRIAL_FOLDER = "QWEN_CL_TRIAL"
"""The environment variable with a trial's folder; its processes are found by it after their parents ended."""


class ProcessStarter:
    """The starter of trials on this machine."""

    detached = False
    """False: trials are stopped when the sweep is interrupted."""

    def __init__(self, hydra_arguments: Sequence[str]) -> None:
        """Start every trial with ``hydra_arguments``, the arguments of Hydra's own command line."""
        self.hydra_arguments = list(hydra_arguments)

    def __call__(self, batch: Sequence[tuple[Trial, Slot]]) -> list[TrialProcess]:
        """Start the trials."""
        return [self._start(trial, slot) for trial, slot in batch]

    def preview(self, trials: Sequence[Trial]) -> str:
        """Return nothing: a dry run only lists the trials."""
        return ""

    def _start(self, trial: Trial, slot: Slot) -> TrialProcess:
        before = trial.record()
        trial.archive_unless_resumed()
        trial.begin(before, slot.cost, slot.gpus)
        return TrialProcess(trial, slot, self.hydra_arguments)


class TrialProcess:
    """The process ``python launch.py hydra.run.dir=FOLDER OVERRIDES`` of a trial.

    It runs in a session of its own, so that signals from the terminal reach it through the sweep only.
    """

    def __init__(self, trial: Trial, slot: Slot, hydra_arguments: list[str]) -> None:
        """Start the process on a slot."""
        self.trial, self.slot = trial, slot
        directory = trial.folder.directory
        command = [sys.executable, str(ROOT / "launch.py"), *hydra_arguments]
        command += [f"hydra.run.dir={quoted(str(directory))}", *trial.overrides, *_template_date(trial)]
        inherited = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}  # one port per trial
        environment = {
            **inherited,
            **slot.environment(trial.plan.config.cluster),
            TRIAL_FOLDER: str(directory),
            SWEEP: str(directory.parent),
            TRIAL_NAME: trial.name,
        }
        with (directory / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=partial(terminate_with_parent, os.getpid()),
            )
        self.ended: float | None = None
        """Monotonic time when it ended; its child processes may take longer."""

    @property
    def state(self) -> str:
        """RUNNING."""
        return State.RUNNING.value

    def is_over(self) -> bool:
        """Return True if it and its child processes have ended; children that take too long to stop are killed."""
        if self.process.poll() is None:
            return False
        if self.ended is None:
            self.ended = time.monotonic()
        remaining = processes_of(self.trial.folder.directory)
        if remaining and time.monotonic() - self.ended > STOP_GRACE:
            kill(remaining)
        return not remaining

    def request_stop(self) -> None:
        """Send SIGTERM: the first makes it save and end as PREEMPTED, the second kills its worker."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it and its child processes."""
        kill(processes_of(self.trial.folder.directory))

    @property
    def returncode(self) -> int:
        """The exit code; negative for a signal."""
        return int(self.process.returncode)

    def last_log_line(self) -> str:
        """Return the last line that it printed."""
        text = (self.trial.folder.directory / LOG).read_text(encoding="utf-8", errors="replace")
        return next((line for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")


def processes_of(directory: Path) -> list[psutil.Process]:
    """Return the processes of a trial, also those whose parents have ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # ended meanwhile, or another user's
            if process.environ().get(TRIAL_FOLDER) == str(directory):
                found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    """Kill the processes that are still running."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def wait_for_exit(directory: Path) -> None:
    """Wait for the processes of a trial whose sweep was killed; they got a signal then, and may still be saving.

    Raises:
        UserError: a process does not end.
    """
    deadline = time.monotonic() + STOP_GRACE + 10
    while remaining := processes_of(directory):
        if time.monotonic() > deadline:
            numbers = ", ".join(str(process.pid) for process in remaining)
            raise UserError(f"{directory} is still in use by process {numbers} of an earlier sweep; stop it first")
        time.sleep(0.2)


def _template_date(trial: Trial) -> list[str]:
    """Return the override of the chat template's date, which is the same for all trials, whenever they start."""
    key, data = "data.template_date", trial.plan.config.data
    overridden = any(override_key(override) == key for override in trial.overrides)
    if overridden or not isinstance(data, ChatDataConfig) or data.template_date is None:
        return []
    return [f"{key}='{data.template_date}'"]
