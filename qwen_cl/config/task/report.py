"""``task=report``: a page of finished runs. Values live in conf/task/report.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import TaskConfig


@dataclass(kw_only=True, slots=True)
class ReportConfig(TaskConfig):
    sweep: str | None
    """Folder of runs, each in a folder of its own."""
    run: str | None
    """Folder of one run."""
    output: str | None
    """File to make; None for report.html in that folder."""
    publish: bool
    """Make a W&B workspace and report too."""

    def __post_init__(self) -> None:
        for key in ("sweep", "run", "output"):
            value = getattr(self, key)
            if value is not None and not value.strip():
                raise UserError(f"task.{key} is empty; name a path, or null")
        if self.publish and self.run is not None:
            raise UserError("task.publish=true makes a workspace of a sweep's runs; write task.sweep=FOLDER")
