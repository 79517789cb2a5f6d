"""``python launch.py -m …``: a trial per combination, all checked before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from qwen_cl.config.sweep import LauncherConfig
from qwen_cl.sweep.combinations import applicable, differing
from qwen_cl.sweep.folder import claim, finished_trials, wait_for_earlier_trials
from qwen_cl.sweep.outcome import Outcome, StopCause
from qwen_cl.sweep.planning import Planner, composer
from qwen_cl.sweep.slots import make_slots
from qwen_cl.sweep.sweep import Sweep, hydra_arguments, make_starter, print_trials, run_trials
from qwen_cl.sweep.trial import Trial, identify


def run_grid(combinations: Sequence[Sequence[str]], loader: ConfigLoader, master: DictConfig) -> None:
    """Run a grid sweep. ``master`` is the config that Hydra composed for the sweep itself.

    Raises:
        UserError: a trial or an option of the launcher is invalid; nothing was started.
        RunFailed: a trial did not complete.
        RunPreempted: the sweep got a signal to stop.
    """
    options = cast(LauncherConfig, OmegaConf.to_object(master.hydra.launcher))
    directory = Path(master.hydra.sweep.dir).absolute()
    with claim(directory):
        wait_for_earlier_trials(directory)
        planner = Planner(composer(loader, master), directory)
        trials = plan_trials(combinations, planner, directory)
        clusters = [trial.plan.config.cluster for trial in trials]
        slots = make_slots(options, clusters, len(trials))
        sweep = Sweep(directory, slots, options, make_starter(clusters, directory, hydra_arguments(master)))
        if any(trial.plan.config.dry_run for trial in trials):
            print_trials(sweep, trials, len(trials))
            return
        for trial in trials:
            planner.prepare(trial.plan)
        done = finished_trials(trials)
        waiting = [trial for trial in trials if trial not in done]
        run_trials(sweep, TrialList(waiting), planned=len(trials), done=done, waiting=waiting)


def plan_trials(combinations: Sequence[Sequence[str]], planner: Planner, directory: Path) -> list[Trial]:
    """Plan every combination.

    Raises:
        UserError: a trial is invalid.
    """
    retained, notes = applicable(combinations, planner.compose)
    keys = differing(retained)
    plans = [planner.plan(overrides, keys) for overrides in retained]
    for note in notes:
        print(note)
    return identify(list(zip(retained, plans)), keys, directory)


class TrialList:
    """A source of trials (see scheduler.py) that takes them from a list."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        """Take the trials in the order of the list."""
        self.remaining = list(trials)

    def next(self) -> Trial | None:
        """Return the next trial, or None."""
        return self.remaining.pop(0) if self.remaining else None

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Ignore the outcome."""

    def stop_cause(self, trial: Trial) -> StopCause | None:
        """Return None: no trial is stopped early."""
        return None

    def waiting(self) -> int:
        """Return the number of trials that have not started."""
        return len(self.remaining)
