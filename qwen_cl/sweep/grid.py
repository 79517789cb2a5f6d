"""``python launch.py -m …``: every combination, checked before the first starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from qwen_cl.config.sweep import LauncherConfig
from qwen_cl.sweep.combinations import applicable, differing
from qwen_cl.sweep.folder import claim, decided, wait_for_earlier_trials
from qwen_cl.sweep.outcome import Outcome, StopCause
from qwen_cl.sweep.planning import Planner, composer
from qwen_cl.sweep.slots import make_slots
from qwen_cl.sweep.sweep import Sweep, hydra_arguments, make_starter, print_trials, run_trials
from qwen_cl.sweep.trial import Trial, identify


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
        done = decided(trials)
        waiting = [trial for trial in trials if trial not in done]
        run_trials(sweep, Listed(waiting), planned=len(trials), done=done, waiting=waiting)


def plan_trials(combinations: Sequence[Sequence[str]], planner: Planner, directory: Path) -> list[Trial]:
    """Raises UserError where one of them could not run."""
    kept, notes = applicable(combinations, planner.compose)
    keys = differing(kept)
    plans = [planner.plan(overrides, keys) for overrides in kept]
    for note in notes:
        print(note)
    return identify(list(zip(kept, plans)), keys, directory)


class Listed:
    """Trials in the order of a list."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.remaining = list(trials)

    def next(self) -> Trial | None:
        return self.remaining.pop(0) if self.remaining else None

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        pass

    def why_stop(self, trial: Trial) -> StopCause | None:
        return None

    def waiting(self) -> int:
        return len(self.remaining)
