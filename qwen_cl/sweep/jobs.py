"""Trials as Slurm jobs: submitted, followed, and found again by a later sweep in the same folder."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from qwen_cl.config.cluster import SlurmConfig
from qwen_cl.launch.local import run_variables
from qwen_cl.launch.slurm import commands
from qwen_cl.launch.slurm.commands import Job, SlurmUnavailable
from qwen_cl.launch.slurm.follow import QUERY_SECONDS
from qwen_cl.launch.slurm.job_status import record_job_state, refresh, request_end, seconds_of
from qwen_cl.launch.slurm.script import render_script
from qwen_cl.launch.slurm.submit import submit
from qwen_cl.planning.plan import Plan
from qwen_cl.runs.status import State
from qwen_cl.sweep.slots import Slot
from qwen_cl.sweep.trial import Trial
from qwen_cl.training.prepare import fetch_inputs, initialize_run_folder


class Queue:
    """The Slurm states of all jobs of a sweep, from one query."""

    def __init__(self) -> None:
        """Start without jobs; a TrialJob adds its number."""
        self.numbers: set[str] = set()
        self.known: dict[str, Job | None] = {}
        """State by job id; None if Slurm no longer knows the job."""
        self._last = float("-inf")

    def refresh(self) -> None:
        """Query Slurm, unless that was done a moment ago."""
        if time.monotonic() < self._last + QUERY_SECONDS or not self.numbers:
            return
        self._last = time.monotonic()
        try:
            found = commands.query(sorted(self.numbers))
        except SlurmUnavailable:  # retried at the next call
            return
        self.known = {number: found.get(number) for number in self.numbers}

    def is_over(self, number: str) -> bool:
        """Return True if the job had ended at the last query."""
        return number in self.known and ((job := self.known[number]) is None or job.is_over)


class TrialJob:
    """A trial that runs as a Slurm job, or as a task of a job array."""

    returncode = 0
    """Always 0: the status of the run says how it ended."""

    def __init__(self, trial: Trial, slot: Slot, number: str, queue: Queue) -> None:
        """Follow the job ``number`` of a trial."""
        self.trial, self.slot, self.number, self.queue = trial, slot, number, queue
        queue.numbers.add(number)

    @property
    def state(self) -> str:
        """RUNNING, or SUBMITTED while the job is pending."""
        return State.SUBMITTED.value if self.trial.folder.status().state is State.SUBMITTED else State.RUNNING.value

    def is_over(self) -> bool:
        """Return True if the job has ended; its final state is then recorded."""
        self.queue.refresh()
        if not self.queue.is_over(self.number):
            return False
        record_job_state(self.trial.folder, self.number, self.queue.known[self.number])
        self.queue.numbers.discard(self.number)
        self.trial.count(seconds_of(self.trial.folder.status()))
        return True

    def request_stop(self) -> None:
        """Cancel a pending job; make a running one save and end, without being requeued."""
        if self.state == State.SUBMITTED:
            commands.cancel(self.number)
        else:
            request_end(self.trial.folder, self.number)

    def kill(self) -> None:
        """Do nothing: jobs keep running when the sweep ends."""

    def last_log_line(self) -> str:
        """Return the reason for a job that has no log."""
        return f"job {self.number} never started"


class JobStarter:
    """The starter of trials as Slurm jobs; trials that start together with the same resources are one job array."""

    detached = True
    """True: jobs keep running when the sweep is interrupted, and the same command finds them again."""

    def __init__(self, directory: Path) -> None:
        """Start trials in the sweep's folder ``directory``."""
        self.directory, self.queue = directory, Queue()

    def __call__(self, batch: Sequence[tuple[Trial, Slot]]) -> list[TrialJob]:
        """Submit the trials, or find their jobs if they were submitted before.

        Raises:
            UserError: Slurm refuses a job.
            SlurmUnavailable: Slurm does not answer.
        """
        found = {trial.name: refresh(trial.folder) for trial, _ in batch}
        numbers = {name: job.id for name, job in found.items() if job is not None}
        for group in _groups([trial for trial, _ in batch if trial.name not in numbers]):
            numbers |= self._submit(group, {trial.name: slot.cost for trial, slot in batch})
        return [TrialJob(trial, slot, numbers[trial.name], self.queue) for trial, slot in batch]

    def preview(self, trials: Sequence[Trial]) -> str:
        """Return the batch scripts."""
        return "\n".join(self._script(group) for group in _groups(trials))

    def _script(self, trials: Sequence[Trial]) -> str:
        config = trials[0].plan.config
        assert isinstance(config.cluster, SlurmConfig)
        return render_script(config.cluster, config, [trial.folder for trial in trials], self.directory)

    def _submit(self, trials: Sequence[Trial], costs: dict[str, float]) -> dict[str, str]:
        plans = [fetch_inputs(trial.plan) for trial in trials]
        config = plans[0].config
        assert isinstance(config.cluster, SlurmConfig)

        def write() -> None:
            for trial, plan in zip(trials, plans):
                _write(trial, plan, costs[trial.name])

        folders = [trial.folder for trial in trials]
        numbers = submit(config.cluster, config, folders, write, self.directory)
        return {trial.name: number for trial, number in zip(trials, numbers)}


def _write(trial: Trial, plan: Plan, cost: float) -> None:
    before = trial.record()
    trial.archive_unless_resumed()
    trial.begin(before, cost)
    with trial.folder.lock():
        initialize_run_folder(plan, trial.folder, invocation=trial.invocation)


def _groups(trials: Sequence[Trial]) -> Iterable[list[Trial]]:
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        config = trial.plan.config
        assert isinstance(config.cluster, SlurmConfig)
        key = repr((config.cluster, run_variables(config))) if config.cluster.array else trial.name
        groups.setdefault(key, []).append(trial)
    return groups.values()
