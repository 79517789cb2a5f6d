"""The run of a sweep: from its first trial to its results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from qwen_cl.config.cluster import ClusterConfig, SlurmConfig
from qwen_cl.config.errors import RunFailed, RunPreempted, UserError
from qwen_cl.config.override_text import printed_path
from qwen_cl.config.sweep import LauncherConfig
from qwen_cl.reporting.console import console_for_tables
from qwen_cl.reporting.output import tolerate_broken_output
from qwen_cl.reporting.report import write_report
from qwen_cl.reporting.tracking.identity import sync_command
from qwen_cl.runs.status import State, now
from qwen_cl.sweep.jobs import JobStarter
from qwen_cl.sweep.processes import ProcessStarter
from qwen_cl.sweep.results import print_results, read_results, write_results
from qwen_cl.sweep.running import Starter
from qwen_cl.sweep.scheduler import Scheduler, Source
from qwen_cl.sweep.slots import Slot
from qwen_cl.sweep.trial import Trial
from qwen_cl.sweep.view import WAITING, SweepView, tally


@dataclass(frozen=True, slots=True)
class Sweep:
    """The settings that all trials of a sweep share."""

    directory: Path
    slots: Sequence[Slot]
    options: LauncherConfig
    start: Starter

    def describe(self, planned: int, done: int = 0) -> str:
        """Return a line with the numbers of trials and slots."""
        completed = f", {done} already completed" if done else ""
        slots = f"{len(self.slots)} at a time" + (" in Slurm's queue" if self.start.detached else "")
        if self.slots[0].gpus:
            slots += f", on GPUs {' '.join(dict.fromkeys(','.join(slot.gpus) for slot in self.slots))}"
        return f"{planned} trials{completed}, {slots}, in {self.directory}"


def run_trials(
    sweep: Sweep, source: Source, *, planned: int, done: Sequence[Trial] = (), waiting: Sequence[Trial] = ()
) -> None:
    """Run the trials of ``source``, and write and print the results.

    ``planned`` is the number of all trials; ``done`` and ``waiting`` are those known before the start.

    Raises:
        RunFailed: a trial neither completed nor was pruned.
        RunPreempted: the sweep got a signal to stop.
    """
    with tolerate_broken_output(sweep.directory):
        console = console_for_tables()
        scheduler = Scheduler(sweep.slots, sweep.options, source, sweep.start)
        console.print(sweep.describe(planned, len(done)), highlight=False, soft_wrap=True, markup=False)
        started, start = time.monotonic(), now().isoformat()
        try:
            with SweepView(console) as view:
                for trial in (*done, *waiting):
                    view.add(trial, trial.folder.status().state if trial in done else None)
                scheduler.run(lambda: view.update(scheduler))
        finally:
            facts = {"start": start, "end": now().isoformat(), "seconds": round(time.monotonic() - started, 3)}
            report(sweep.directory, facts, console)
    _conclude(scheduler, [str(trial.folder.status().state) for trial in done], sweep.directory)


def report(directory: Path, facts: dict[str, Any], console: Console) -> None:
    """Write and print the results of all trials in the folder, however the sweep ended."""
    results = read_results(directory)
    write_results(directory, results, facts)
    used = sum(result.seconds for result in results), sum(result.gpu_seconds for result in results)
    cost = f"{facts['seconds']:.0f} s; all trials together {used[0]:.0f} s"
    lines = [
        ("time", cost + (f", {used[1]:.0f} GPU-seconds" if used[1] else "")),
        ("results", str(directory / "sweep.csv")),
        *_page_facts(directory),
    ]
    if command := sync_command(directory):
        lines.append(("upload", command))
    print_results(results, lines, console)


def _page_facts(directory: Path) -> list[tuple[str, str]]:
    """Write the page; an error is only printed, as it must not hide how the sweep ended."""
    try:
        page, *plots = write_report(directory)
    except UserError as error:
        return [("no page", str(error))]
    return [("page", str(page)), *(("plot", str(path)) for path in plots)]


def print_trials(sweep: Sweep, trials: Sequence[Trial], planned: int) -> None:
    """Print the trials of a dry run."""
    console = Console()
    console.print(sweep.describe(planned), highlight=False, soft_wrap=True, markup=False)
    width = max(len(trial.name) for trial in trials)
    for trial in trials:
        console.print(
            f"{trial.name:{width}}  {' '.join(trial.overrides)}", highlight=False, soft_wrap=True, markup=False
        )
    if script := sweep.start.preview(trials):
        print(f"\n{script}", end="")


def hydra_arguments(master: DictConfig) -> list[str]:
    """Return the Hydra arguments of the sweep's command line that a trial needs to find the same config files."""
    arguments = []
    if master.hydra.job.config_name != "config":
        arguments += ["--config-name", str(master.hydra.job.config_name)]
    for source in master.hydra.runtime.config_sources:
        if source.provider == "command-line":
            arguments += ["--config-dir", str(source.path)]
    return arguments


def _conclude(scheduler: Scheduler, before: Sequence[str], directory: Path) -> None:
    outcomes = scheduler.outcomes.values()
    waiting = scheduler.waiting()
    left = [process.state for process in scheduler.running]
    states = [*before, *(outcome.state.value for outcome in outcomes), *left, *[WAITING] * waiting]
    message = f"{tally(states)}; the same command with {printed_path('hydra.sweep.dir', directory)} resumes there"
    if scheduler.interrupted:
        raise RunPreempted(f"PREEMPTED: {message}")
    if waiting or not all(outcome.state is State.COMPLETED or outcome.pruned for outcome in outcomes):
        raise RunFailed(f"FAILED: {message}")


def make_starter(clusters: Sequence[ClusterConfig], directory: Path, hydra_arguments: Sequence[str]) -> Starter:
    """Return the starter for the trials' clusters, which are all of one kind (``make_slots``)."""
    return JobStarter(directory) if isinstance(clusters[0], SlurmConfig) else ProcessStarter(hydra_arguments)
