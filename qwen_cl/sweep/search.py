"""``hydra/sweeper=optuna``: each trial is proposed when a slot is free, from what those before it came to."""

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

JOBS_OF_A_SEARCH = 4
"""In a cluster's queue at once, where ``hydra.launcher.jobs`` does not say: each is proposed from those that ended."""
STUDY = "study.journal"
"""In the sweep's folder: Optuna's own record, read by ``JournalStorage``."""


def run_search(overrides: Sequence[Override], loader: ConfigLoader, master: DictConfig) -> None:
    """``master`` is what Hydra composed for the sweep itself.

    Raises:
        UserError: Optuna is missing, there is nothing to search, or the ends of the space could not run.
        RunFailed: not every trial completed or was pruned.
        RunPreempted: the sweep was asked to stop.
    """
    options = cast(OptunaConfig, OmegaConf.to_object(master.hydra.sweeper))
    launcher = OmegaConf.to_object(master.hydra.launcher)
    if not isinstance(launcher, LauncherConfig):
        raise UserError(
            f"hydra/launcher={master.hydra.runtime.choices['hydra/launcher']} runs its trials in batches, which "
            "hydra/sweeper=optuna does not make; remove it, for hydra/launcher=processes"
        )
    space = Space(overrides)
    directory = Path(master.hydra.sweep.dir).absolute()
    with claim(directory):
        wait_for_earlier_trials(directory)
        planner = Planner(composer(loader, master), directory)
        ends = [(overrides, planner.plan(overrides, space.keys)) for overrides in space.ends(planner)]
        clusters = [plan.config.cluster for _, plan in ends]
        slots = make_slots(launcher, clusters, JOBS_OF_A_SEARCH)
        sweep = Sweep(directory, slots, launcher, make_starter(clusters, directory, hydra_arguments(master)))
        if any(plan.config.dry_run for _, plan in ends):
            print_trials(sweep, identify(ends, space.keys, directory), options.n_trials)
            return
        for _, plan in ends:
            planner.prepare(plan)
        study = open_study(directory, options, _first_rung(options, [plan for _, plan in ends]))
        proposals = Proposals(study, space, planner, options, directory)
        run_trials(sweep, proposals, planned=options.n_trials)


def open_study(directory: Path, options: OptunaConfig, first_rung: int) -> Any:
    """A new one, or that of the sweep's folder. A seed is used once: after a resume nothing is drawn again.

    Raises:
        UserError: the folder's study minimises something else.
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
            f"hydra.sweeper.objectives ({', '.join(names)}) were {', '.join(before)} in {directory}; say the same, or "
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
