"""The settings of task=inspect."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_cl.config.fields import Affects, setting
from qwen_cl.config.task.training import TaskConfig
from qwen_cl.config.validation import require


@dataclass(kw_only=True, slots=True)
class InspectConfig(TaskConfig):
    """The inspection of a model; memory is estimated for these sizes."""

    sequence_length: int
    micro_batch_size: int = field(metadata=setting(Affects.execution))
    micro_batches: int
    """Micro batches per rank and step; a pipeline has one in flight per stage."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "micro_batch_size", "micro_batches"):
            require(f"task.{name}", getattr(self, name), at_least=1)
