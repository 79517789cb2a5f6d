"""The settings of task=report: a page about finished runs."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import TaskConfig


@dataclass(kw_only=True, slots=True)
class ReportConfig(TaskConfig):
    sweep: str | None
    """Folder with one folder per run."""
    run: str | None
    """Folder of one run."""
    output: str | None
    """Output file; None for report.html in that folder."""
    publish: bool
    """Also create a W&B workspace and report."""

    def __post_init__(self) -> None:
        for key in ("sweep", "run", "output"):
            value = getattr(self, key)
            if value is not None and not value.strip():
                raise UserError(f"task.{key} is empty; name a path, or null")
        if self.publish and self.run is not None:
            raise UserError("task.publish=true makes a workspace of a sweep's runs; write task.sweep=FOLDER")
