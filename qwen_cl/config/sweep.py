"""The launcher and sweeper of sweeps: ``hydra.launcher`` and ``hydra.sweeper``. Values are in conf/hydra/."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qwen_cl.config.errors import UserError
from qwen_cl.config.validation import require

PLUGINS = "hydra_plugins.qwen_cl_sweeps"


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    gpus: list[str] | None
    """GPUs as in CUDA_VISIBLE_DEVICES; None for all visible ones."""
    gpus_per_trial: int | None
    """GPUs per trial; None for ``cluster.devices``."""
    trials_per_gpu: int
    """Trials that share each GPU."""
    cpu_slots: int | None
    """Concurrent trials without a GPU; None for one per two cores."""
    jobs: int | None
    """Trials in the queue of a cluster at once; None for all, or four in a search."""
    max_retries: int
    """Restarts of a trial whose process was lost."""
    fail_fast: bool
    """End the sweep when the first trial fails."""
    _target_: str = f"{PLUGINS}.ProcessLauncher"  # Hydra's way to name a plugin; not for a file to say

    def __post_init__(self) -> None:
        require("hydra.launcher.trials_per_gpu", self.trials_per_gpu, at_least=1)
        require("hydra.launcher.max_retries", self.max_retries, at_least=0)
        for name in ("gpus_per_trial", "cpu_slots", "jobs"):
            value = getattr(self, name)
            if value is not None:
                require(f"hydra.launcher.{name}", value, at_least=1)


@dataclass(kw_only=True, slots=True)
class GridConfig:
    """A grid sweep over all combinations of the given values."""

    _target_: str = f"{PLUGINS}.GridSweeper"


class Objective(str, Enum):
    """A quantity that a search minimizes."""

    val_loss = "val_loss"
    """The target's validation loss."""
    forgetting = "forgetting"
    """The mean increase of the losses of the retention sets."""


@dataclass(kw_only=True, slots=True)
class OptunaConfig:
    """A search by Optuna's tree-structured Parzen estimator (arXiv 2304.11127)."""

    n_trials: int
    """Total number of trials, including those of a resumed sweep."""
    startup_trials: int
    """Random trials before the estimator is used."""
    seed: int
    objectives: list[Objective]
    """Objectives to minimize; two give a Pareto front."""
    reduction_factor: int | None
    """Asynchronous successive halving (arXiv 1810.05934): one in this many trials passes a rung. None: no pruning."""
    min_steps: int | None
    """Optimizer steps of the first rung; None for ``task.val_check_interval``."""
    _target_: str = f"{PLUGINS}.OptunaSweeper"

    def __post_init__(self) -> None:
        require("hydra.sweeper.n_trials", self.n_trials, at_least=1)
        require("hydra.sweeper.startup_trials", self.startup_trials, at_least=1)
        require("hydra.sweeper.seed", self.seed, at_least=0)
        if self.reduction_factor is not None:
            require("hydra.sweeper.reduction_factor", self.reduction_factor, at_least=2)
        if self.min_steps is not None:
            require("hydra.sweeper.min_steps", self.min_steps, at_least=1)
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            requested = ", ".join(objective.value for objective in self.objectives) or "none"
            raise UserError(f"hydra.sweeper.objectives ({requested}) must name val_loss, forgetting or both, each once")
        if self.reduction_factor is not None and self.objectives != [Objective.val_loss]:
            raise UserError(
                f"hydra.sweeper.reduction_factor ({self.reduction_factor}) prunes by the validation loss alone; set it "
                "to null with other objectives"
            )
