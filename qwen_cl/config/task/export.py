"""The settings of task=export."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import TaskConfig

HUB_NAME = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)")


SIZE = re.compile(r"[1-9][0-9]*[KMGT]B")


class ExportFormat(str, Enum):
    merged = "merged"
    adapter = "adapter"


class ExportDtype(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass(kw_only=True, slots=True)
class ExportConfig(TaskConfig):
    """The export of a run for transformers and PEFT. Other settings are in the run's config.yaml."""

    run: str
    """Folder of the run."""
    step: int | None
    """Step of the checkpoint; None for the latest valid one."""
    output: str | None
    """Output folder; None for ``export-<format>`` in the run folder."""
    format: ExportFormat
    dtype: ExportDtype
    """Dtype of the merged model; ``auto`` keeps that of each base tensor."""
    max_shard_size: str
    """Maximum size of a safetensors file, like 5GB; also the approximate memory needed."""
    push_to: str | None
    """``hf://ORG/NAME`` to upload to; None for no upload."""

    def __post_init__(self) -> None:
        if not self.run.strip():
            raise UserError("task.run is empty; name the folder of a run, like outputs/finetune-lora/TIME")
        if self.output is not None and not self.output.strip():
            raise UserError("task.output is empty; name a folder to make, or null for one in the run's")
        if self.format is ExportFormat.adapter and self.dtype is not ExportDtype.auto:
            raise UserError(
                f"task.dtype ({self.dtype.value}) is for task.format=merged; an adapter keeps what it was trained in"
            )
        if self.push_to is not None and not HUB_NAME.fullmatch(self.push_to):
            raise UserError(f"task.push_to ({self.push_to}) must read hf://ORG/NAME")
        if not SIZE.fullmatch(self.max_shard_size):
            raise UserError(f"task.max_shard_size ({self.max_shard_size}) must read like 5GB or 500MB")
