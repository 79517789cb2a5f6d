"""``hydra/sweeper=optuna``: each trial is proposed when a slot is free, from the results of the earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qwen_cl.config.errors import UserError
from qwen_cl.config.renamed_keys import rename_mapping
from qwen_cl.config.sweep import LauncherConfig, OptunaConfig
from qwen_cl.planning.plan import Plan
from qwen_cl.sweep.folder import claim, wait_for_earlier_trials
from qwen_cl.sweep.planning import Planner, composer
from qwen_cl.sweep.proposals import Proposals
from qwen_cl.sweep.slots import make_slots
from qwen_cl.sweep.space import Space, _optuna
from qwen_cl.sweep.sweep import Sweep, hydra_arguments, make_starter, print_trials, run_trials
from qwen_cl.sweep.trial import identify

if TYPE_CHECKING:
    pass

SEARCH_JOBS = 4
"""The default of ``hydra.launcher.jobs``: few at once, as each is proposed from the results of those that ended."""
STUDY = "study.journal"
"""The file of Optuna's study in the sweep's folder, in the format of ``JournalStorage``."""


def run_search(overrides: Sequence[Override], loader: ConfigLoader, master: DictConfig) -> None:
    """Run a search. ``master`` is the config that Hydra composed for the sweep itself.

    Raises:
        UserError: Optuna is not installed, there is nothing to search, or a trial at the bounds is invalid.
        RunFailed: a trial neither completed nor was pruned.
        RunPreempted: the sweep got a signal to stop.
    """
    options = cast(OptunaConfig, OmegaConf.to_object(master.hydra.sweeper))
    launcher = OmegaConf.to_object(master.hydra.launcher)
    if not isinstance(launcher, LauncherConfig):
        raise UserError(
            f"hydra/launcher={master.hydra.runtime.choices['hydra/launcher']} runs batches of trials, and "
            "hydra/sweeper=optuna proposes one at a time; remove it, to use hydra/launcher=processes"
        )
    space = Space(overrides)
    directory = Path(master.hydra.sweep.dir).absolute()
    with claim(directory):
        wait_for_earlier_trials(directory)
        planner = Planner(composer(loader, master), directory)
        bounds = [(overrides, planner.plan(overrides, space.keys)) for overrides in space.bounds(planner)]
        clusters = [plan.config.cluster for _, plan in bounds]
        slots = make_slots(launcher, clusters, SEARCH_JOBS)
        sweep = Sweep(directory, slots, launcher, make_starter(clusters, directory, hydra_arguments(master)))
        if any(plan.config.dry_run for _, plan in bounds):
            print_trials(sweep, identify(bounds, space.keys, directory), options.n_trials)
            return
        for _, plan in bounds:
            planner.prepare(plan)
        study = open_study(directory, options, _first_rung(options, [plan for _, plan in bounds]))
        proposals = Proposals(study, space, planner, options, directory)
        run_trials(sweep, proposals, planned=options.n_trials)


def open_study(directory: Path, options: OptunaConfig, first_rung: int) -> Any:
    """Open the study of the sweep's folder, or create it.

    A resumed study has another seed, so that it does not propose the first points again.

    Raises:
        UserError: the folder's study has other objectives.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(directory / STUDY))
    storage = optuna.storages.JournalStorage(backend)
    factor = options.reduction_factor
    pruner = optuna.pruners.NopPruner()
    if factor is not None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=factor)
    names = [objective.value for objective in options.objectives]
    study = optuna.create_study(
        study_name="sweep",
        storage=storage,
        load_if_exists=True,
        directions=["minimize"] * len(names),
        pruner=pruner,
    )
    before = rename_mapping({"objectives": study.user_attrs.get("objectives", names)}, "hydra.sweeper")["objectives"]
    if before != names:
        raise UserError(
            f"hydra.sweeper.objectives ({', '.join(names)}) were {', '.join(before)} in {directory}; use the same, or "
            "choose another hydra.sweep.dir"
        )
    study.set_user_attr("objectives", names)
    study.sampler = optuna.samplers.TPESampler(
        seed=options.seed + len(study.trials), n_startup_trials=options.startup_trials
    )
    return study


def _first_rung(options: OptunaConfig, plans: Sequence[Plan]) -> int:
    if options.min_steps is not None:
        return options.min_steps
    return min(plan.config.training.val_check_interval for plan in plans)
