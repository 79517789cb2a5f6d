"""The settings of task=job: control of a submitted run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import TaskConfig


class JobAction(str, Enum):
    status = "status"
    follow = "follow"
    logs = "logs"
    cancel = "cancel"


@dataclass(kw_only=True, slots=True)
class JobConfig(TaskConfig):
    run: str
    """Folder of the run."""
    action: JobAction

    def __post_init__(self) -> None:
        if not self.run.strip():
            raise UserError("task.run is empty; name the folder of a run, like outputs/finetune-lora/TIME")
