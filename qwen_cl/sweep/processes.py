"""A trial's processes: started, asked to stop, and found again when the one that started them is gone."""

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
"""In a trial's folder: what a run alone prints on the terminal."""
MARK = "QWEN_CL_TRIAL"
"""Environment of every process of a trial: its folder. They are found by it when their parents are gone."""


class ProcessStarter:
    """Trials on this machine."""

    leaves = False
    """When the sweep is interrupted, they are stopped."""

    def __init__(self, hydra_arguments: Sequence[str]) -> None:
        self.hydra_arguments = list(hydra_arguments)

    def __call__(self, batch: Sequence[tuple[Trial, Slot]]) -> list[TrialProcess]:
        return [self._start(trial, slot) for trial, slot in batch]

    def preview(self, trials: Sequence[Trial]) -> str:
        return ""

    def _start(self, trial: Trial, slot: Slot) -> TrialProcess:
        before = trial.record()
        trial.make_room()
        trial.begin(before, slot.cost, slot.gpus)
        return TrialProcess(trial, slot, self.hydra_arguments)


class TrialProcess:
    """``python launch.py hydra.run.dir=FOLDER OVERRIDES`` on a slot, in a session of its own: what comes from the
    terminal reaches it through us alone."""

    def __init__(self, trial: Trial, slot: Slot, hydra_arguments: list[str]) -> None:
        self.trial, self.slot = trial, slot
        directory = trial.folder.directory
        command = [sys.executable, str(ROOT / "launch.py"), *hydra_arguments]
        command += [f"hydra.run.dir={quoted(str(directory))}", *trial.overrides, *_template_date(trial)]
        inherited = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}  # each takes its own
        environment = {
            **inherited,
            **slot.environment(trial.plan.config.cluster),
            MARK: str(directory),
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
        """When it ended; what it started may take longer."""

    @property
    def state(self) -> str:
        return State.RUNNING.value

    def is_over(self) -> bool:
        """It and all that it started. What outlives it for too long was asked to stop when it died, and is killed."""
        if self.process.poll() is None:
            return False
        if self.ended is None:
            self.ended = time.monotonic()
        remaining = processes_of(self.trial.folder.directory)
        if remaining and time.monotonic() - self.ended > STOP_GRACE:
            kill(remaining)
        return not remaining

    def ask_to_stop(self) -> None:
        """Once: it saves, and ends as PREEMPTED. A second time kills its worker."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        kill(processes_of(self.trial.folder.directory))

    @property
    def returncode(self) -> int:
        return int(self.process.returncode)

    def last_log_line(self) -> str:
        """The last line that it printed."""
        text = (self.trial.folder.directory / LOG).read_text(encoding="utf-8", errors="replace")
        return next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def processes_of(directory: Path) -> list[psutil.Process]:
    """All that run for a trial, whoever their parents are now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # gone meanwhile, or somebody else's
            if process.environ().get(MARK) == str(directory):
                found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def wait_for_the_end_of(directory: Path) -> None:
    """What a sweep that was killed had started was asked to stop by the system, and may be saving still.

    Raises:
        UserError: it does not end.
    """
    deadline = time.monotonic() + STOP_GRACE + 10
    while remaining := processes_of(directory):
        if time.monotonic() > deadline:
            numbers = ", ".join(str(process.pid) for process in remaining)
            raise UserError(f"{directory} is still written to by process {numbers}, of a sweep before; stop it first")
        time.sleep(0.2)


def _template_date(trial: Trial) -> list[str]:
    """The day that its template renders, which is the same for all trials, whenever each starts."""
    key, data = "data.template_date", trial.plan.config.data
    said = any(override_key(override) == key for override in trial.overrides)
    if said or not isinstance(data, ChatDataConfig) or data.template_date is None:
        return []
    return [f"{key}='{data.template_date}'"]
