"""What Hydra finds by this namespace, every time it composes: nothing heavy is imported here."""

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
    """``hydra/launcher=processes``: see qwen_cl/sweep/."""

    def __init__(self, **options: Any) -> None:
        """Hydra's way to make a plugin; ``setup`` gets the same options, typed."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = hydra_context.config_loader
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from qwen_cl.sweep.grid import run_grid

        run_grid(job_overrides, self.loader, self.config)
        return []


class GridSweeper(Sweeper):
    """``hydra/sweeper=grid``: hands every combination to the launcher at once."""

    def __init__(self, **options: Any) -> None:
        """Hydra's way to make a plugin; there are no options."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = hydra_context.config_loader
        self.starter = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from qwen_cl.sweep.combinations import combinations

        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(arguments)
        finished = self.starter.launch(combinations(overrides), initial_job_idx=0)
        for job in finished:
            _ = job.return_value  # raises what hydra/launcher=basic caught
        return finished


class OptunaSweeper(Sweeper):
    """``hydra/sweeper=optuna``: asks and tells between trials, which the launcher's batches cannot."""

    def __init__(self, **options: Any) -> None:
        """Hydra's way to make a plugin; ``setup`` gets the same options, typed."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = hydra_context.config_loader
        self.master = config

    def sweep(self, arguments: list[str]) -> Any:
        from qwen_cl.sweep.search import run_search

        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(arguments)
        return run_search(overrides, self.loader, self.master)
