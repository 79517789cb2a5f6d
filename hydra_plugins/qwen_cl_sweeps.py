"""The Hydra plugins for sweeps. Hydra imports this module whenever it composes, so heavy imports are in functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessLauncher(Launcher):
    """The launcher ``hydra/launcher=processes``, which runs a grid of trials (see qwen_cl/sweep/)."""

    def __init__(self, **options: Any) -> None:
        """Ignore the options, which ``setup`` gets in the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the loader and the config for ``launch``."""
        self.loader = hydra_context.config_loader
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a trial per combination."""
        from qwen_cl.sweep.grid import run_grid

        run_grid(job_overrides, self.loader, self.config)
        return []


class GridSweeper(Sweeper):
    """The sweeper ``hydra/sweeper=grid``, which passes all combinations to the launcher at once."""

    def __init__(self, **options: Any) -> None:
        """Accept no options."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Create the launcher."""
        self.loader = hydra_context.config_loader
        self.starter = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch all combinations of the overrides."""
        from qwen_cl.sweep.combinations import combinations

        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(arguments)
        finished = self.starter.launch(combinations(overrides), initial_job_idx=0)
        for job in finished:
            _ = job.return_value  # raises the error that hydra/launcher=basic caught
        return finished


class OptunaSweeper(Sweeper):
    """The sweeper ``hydra/sweeper=optuna``, which proposes each trial from the results of the earlier ones.

    It does not use a Hydra launcher, which runs trials in batches.
    """

    def __init__(self, **options: Any) -> None:
        """Ignore the options, which ``setup`` gets in the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the loader and the config for ``sweep``."""
        self.loader = hydra_context.config_loader
        self.master = config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the search."""
        from qwen_cl.sweep.search import run_search

        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(arguments)
        return run_search(overrides, self.loader, self.master)
