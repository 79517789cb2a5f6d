"""``python launch.py -m …``: every combination, checked before the first starts, and the answer at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from qwen_cl.config.errors import RunFailed, RunPreempted
from qwen_cl.config.sweep import LauncherConfig
from qwen_cl.run_folder import State, now
from qwen_cl.sweep.combinations import applicable, differing
from qwen_cl.sweep.folder import claim, settled, wait_for_earlier_trials
from qwen_cl.sweep.outcome import Outcome
from qwen_cl.sweep.pictures import draw_sweep
from qwen_cl.sweep.planning import Planner, composer
from qwen_cl.sweep.results import print_results, read_results, write_results
from qwen_cl.sweep.scheduler import Scheduler
from qwen_cl.sweep.slots import Slot, make_slots
from qwen_cl.sweep.trial import Trial, identify
from qwen_cl.sweep.view import SweepView, tally
from qwen_cl.view import print_facts


class Listed:
    """Trials in the order of a list."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.remaining = list(trials)

    def next(self) -> Trial | None:
        return self.remaining.pop(0) if self.remaining else None

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        pass

    def why_stop(self, trial: Trial) -> str | None:
        return None


def run_grid(combinations: Sequence[Sequence[str]], loader: ConfigLoader, master: DictConfig) -> None:
    """``master`` is what Hydra composed for the sweep itself.

    Raises:
        UserError: a trial, or what the sweep is to run on, is not what it must be; nothing was started.
        RunFailed: not every trial completed.
        RunPreempted: the sweep was asked to stop.
    """
    options = cast(LauncherConfig, OmegaConf.to_object(master.hydra.launcher))
    directory = Path(master.hydra.sweep.dir).absolute()
    with claim(directory):
        wait_for_earlier_trials(directory)
        planner = Planner(composer(loader, master))
        trials = plan_trials(combinations, planner, directory)
        slots = make_slots(options, [trial.plan.config.cluster for trial in trials])
        if any(trial.plan.config.dry_run for trial in trials):
            print_trials(trials, slots, directory)
            return
        for trial in trials:
            planner.fetch(trial.plan)
        _run(trials, slots, options, hydra_arguments(master), directory)


def plan_trials(combinations: Sequence[Sequence[str]], planner: Planner, directory: Path) -> list[Trial]:
    """Raises UserError where one of them could not run."""
    kept, notes = applicable(combinations, planner.compose)
    keys = differing(kept)
    plans = [planner.plan(overrides, keys) for overrides in kept]
    for note in notes:
        print(note)
    return identify(list(zip(kept, plans)), keys, directory)


def _run(
    trials: Sequence[Trial], slots: Sequence[Slot], options: LauncherConfig, arguments: list[str], directory: Path
) -> None:
    console = Console()
    done = settled(trials)
    scheduler = Scheduler(slots, options, Listed([trial for trial in trials if trial not in done]), arguments)
    print_start(f"{len(trials)} trials" + (f", {len(done)} there already" if done else ""), slots, directory, console)
    started, start = time.monotonic(), now()
    with SweepView(console) as view:
        for trial in trials:
            view.add(trial, trial.folder.status()["state"] if trial in done else None)
        try:
            scheduler.run(lambda: view.update(scheduler))
        finally:
            report(directory, {"start": start, "end": now(), "seconds": time.monotonic() - started}, console)
    conclude(scheduler, [trial.folder.status()["state"] for trial in done], len(trials), directory)


def report(directory: Path, facts: dict[str, Any], console: Console) -> None:
    """Files, pictures and the table, of all that the folder has; however the sweep ended."""
    results = read_results(directory)
    write_results(directory, results, facts)
    pictures = draw_sweep(directory, results)
    used = sum(result.seconds for result in results), sum(result.gpu_seconds for result in results)
    cost = f"{facts['seconds']:.0f} s; all trials together {used[0]:.0f} s"
    lines = [
        ("time", cost + (f", {used[1]:.0f} GPU-seconds" if used[1] else "")),
        ("results", str(directory / "sweep.csv")),
        *(("picture", str(path)) for path in pictures),
    ]
    print_results(results, lines, console)


def conclude(scheduler: Scheduler, before: Sequence[str], planned: int, directory: Path) -> None:
    """Raises RunFailed or RunPreempted unless every trial is where it should be."""
    states = [*before, *(outcome.state.value for outcome in scheduler.outcomes.values())]
    waiting = ["waiting"] * (planned - len(states))
    message = f"{tally([*states, *waiting])}; the same command with hydra.sweep.dir={directory} goes on from there"
    if scheduler.interrupted:
        raise RunPreempted(f"PREEMPTED: {message}")
    pruned = sum(outcome.pruned for outcome in scheduler.outcomes.values())
    if waiting or states.count(State.COMPLETED.value) + pruned < len(states):
        raise RunFailed(f"FAILED: {message}")


def print_start(what: str, slots: Sequence[Slot], directory: Path, console: Console) -> None:
    where = f"{len(slots)} at a time"
    if slots[0].gpus:
        where += f", on GPUs {' '.join(dict.fromkeys(','.join(slot.gpus) for slot in slots))}"
    console.print(f"{what}, {where}, in {directory}", highlight=False, soft_wrap=True, markup=False)


def print_trials(trials: Sequence[Trial], slots: Sequence[Slot], directory: Path) -> None:
    """The dry run of a sweep."""
    console = Console()
    print_start(f"{len(trials)} trials", slots, directory, console)
    print_facts([(trial.name, " ".join(trial.overrides)) for trial in trials], console)


def hydra_arguments(master: DictConfig) -> list[str]:
    """What of the sweep's own command line a trial needs to find the same files."""
    arguments = []
    if master.hydra.job.config_name != "config":
        arguments += ["--config-name", str(master.hydra.job.config_name)]
    for source in master.hydra.runtime.config_sources:
        if source.provider == "command-line":
            arguments += ["--config-dir", str(source.path)]
    return arguments
