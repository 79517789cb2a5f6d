"""The settings of the training tasks: task=finetune and task=pretrain."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Affects, setting
from qwen_cl.config.validation import require, seconds_of

AUTO = "auto"


class LossOn(str, Enum):
    assistant = "assistant"
    last_assistant = "last_assistant"
    all = "all"


class LrSchedule(str, Enum):
    cosine = "cosine"
    warmup_hold_decay = "warmup_hold_decay"
    constant = "constant"


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """The base of all tasks."""


@dataclass(kw_only=True, slots=True)
class TrainingConfig(TaskConfig):
    max_steps: int
    """Optimizer steps."""
    max_time: str | None = field(metadata=setting(Affects.nothing))
    """Wall-clock limit, ``[D-]HH:MM:SS`` from the start of the run's processes: the run saves and ends as PREEMPTED."""
    global_batch_size: int
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int | str = field(metadata=setting(Affects.execution))
    """Sequences per micro batch of one rank, or auto."""
    sequence_length: int
    """Tokens per sequence; longer rows are truncated."""
    warmup_steps: int
    """Optimizer steps over which the learning rate rises from 0."""
    lr_schedule: LrSchedule
    """Learning rate schedule after warm-up."""
    min_lr_ratio: float
    """Final learning rate as a fraction of ``lr``, for schedules with decay."""
    decay_ratio: float
    """Fraction of ``max_steps`` in which ``warmup_hold_decay`` decays."""
    weight_decay: float
    clip_grad: float
    """Maximum gradient norm; 0 disables clipping."""
    val_check_interval: int = field(metadata=setting(Affects.execution))
    """Optimizer steps between validations; step 0 and the last step are always validated."""
    checkpoint_interval: int = field(metadata=setting(Affects.execution))
    """Optimizer steps between checkpoints; the last step is always saved."""
    async_save: bool = field(metadata=setting(Affects.nothing))
    """Write checkpoints in the background."""
    keep_last: int = field(metadata=setting(Affects.execution))
    """Number of newest checkpoints to retain."""
    keep_best: int = field(metadata=setting(Affects.execution))
    """Number of validated checkpoints with the lowest validation loss to retain in addition."""
    log_interval: int = field(metadata=setting(Affects.execution))
    """Optimizer steps between lines of metrics.jsonl."""
    sample_prompts: int = field(metadata=setting(Affects.execution))
    """Validation prompts to answer before and after training; 0 for none."""
    sample_tokens: int = field(metadata=setting(Affects.execution))
    """Maximum tokens per answer."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "global_batch_size",
            "val_check_interval",
            "checkpoint_interval",
            "keep_last",
            "log_interval",
        ):
            require(f"task.{name}", getattr(self, name), at_least=1)
        if isinstance(self.micro_batch_size, int):
            require("task.micro_batch_size", self.micro_batch_size, at_least=1)
        elif self.micro_batch_size != AUTO:
            raise UserError(f"task.micro_batch_size ({self.micro_batch_size}) must be a number of sequences, or {AUTO}")
        require("task.sequence_length", self.sequence_length, at_least=2)
        require("task.keep_best", self.keep_best, at_least=0)
        if self.max_time is not None:
            seconds_of("task.max_time", self.max_time)
        require("task.sample_prompts", self.sample_prompts, at_least=0)
        require("task.sample_tokens", self.sample_tokens, at_least=1)
        require("task.warmup_steps", self.warmup_steps, at_least=0)
        require("task.weight_decay", self.weight_decay, at_least=0)
        require("task.clip_grad", self.clip_grad, at_least=0)
        require("task.min_lr_ratio", self.min_lr_ratio, at_least=0, at_most=1)
        require("task.decay_ratio", self.decay_ratio, above=0, at_most=1)
        hold = self.max_steps - self.warmup_steps - self.decay_steps
        if self.lr_schedule is LrSchedule.warmup_hold_decay and hold < 0:
            raise UserError(
                f"task.warmup_steps ({self.warmup_steps}) and task.decay_ratio ({self.decay_ratio:g} of "
                f"task.max_steps, {self.decay_steps} steps) are more than task.max_steps ({self.max_steps}); lower one"
            )
        if self.warmup_steps >= self.max_steps:
            raise UserError(
                f"task.warmup_steps ({self.warmup_steps}) must be less than task.max_steps ({self.max_steps}); "
                "lower it, or train longer"
            )

    @property
    def max_seconds(self) -> float | None:
        return None if self.max_time is None else seconds_of("task.max_time", self.max_time)

    @property
    def resolved_micro_batch_size(self) -> int:
        """The ``micro_batch_size`` of a plan, where it is a number."""
        assert isinstance(self.micro_batch_size, int)
        return self.micro_batch_size

    @property
    def is_packed(self) -> bool:
        """True if several conversations share a sequence."""
        return False

    @property
    def trained_tokens(self) -> LossOn:
        """The loss tokens of conversations."""
        return LossOn.all

    @property
    def decay_steps(self) -> int:
        return max(1, round(self.decay_ratio * self.max_steps))


@dataclass(kw_only=True, slots=True)
class FinetuneConfig(TrainingConfig):
    """Fine-tuning on instruction data, rendered by the model's chat template."""

    loss_on: LossOn
    """Loss tokens of a conversation."""
    packing: bool
    """Pack several conversations into a sequence, each attending to itself only."""

    @property
    def is_packed(self) -> bool:
        return self.packing

    @property
    def trained_tokens(self) -> LossOn:
        return self.loss_on


@dataclass(kw_only=True, slots=True)
class PretrainConfig(TrainingConfig):
    """Training on raw text: documents joined by the end-of-text token and cut into full sequences."""
