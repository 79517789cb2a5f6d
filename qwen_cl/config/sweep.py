"""How a sweep runs and searches: ``hydra.launcher`` and ``hydra.sweeper``. Values live in conf/hydra/."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.config.rules import require

PLUGINS = "hydra_plugins.qwen_cl_sweeps"


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    gpus: list[str] | None
    """Names as in CUDA_VISIBLE_DEVICES; None for all that are visible."""
    gpus_per_trial: int | None
    """None for the ``cluster.devices`` of the trials."""
    trials_per_gpu: int
    """Trials that share each GPU."""
    cpu_slots: int | None
    """Trials at once where there is no GPU; None for one for every two cores."""
    max_retries: int
    """How often a trial starts again whose process was lost."""
    fail_fast: bool
    """The first trial that fails ends the sweep."""
    _target_: str = f"{PLUGINS}.ProcessLauncher"  # Hydra's way to name a plugin; not for a file to say

    def __post_init__(self) -> None:
        require("hydra.launcher.trials_per_gpu", self.trials_per_gpu, at_least=1)
        require("hydra.launcher.max_retries", self.max_retries, at_least=0)
        for name in ("gpus_per_trial", "cpu_slots"):
            value = getattr(self, name)
            if value is not None:
                require(f"hydra.launcher.{name}", value, at_least=1)


@dataclass(kw_only=True, slots=True)
class GridConfig:
    """Every combination of the values that are given."""

    _target_: str = f"{PLUGINS}.GridSweeper"
