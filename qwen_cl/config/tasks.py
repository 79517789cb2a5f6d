"""What a run does: the choices of the group ``task``. See schema.py for the mechanics."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from qwen_cl.config.errors import UserError
from qwen_cl.config.rules import require, seconds_of

HUB_NAME = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)")
AUTO = "auto"
SIZE = re.compile(r"[1-9][0-9]*[KMGT]B")


class LossOn(str, Enum):
    answers = "answers"
    last_answer = "last_answer"
    all = "all"


class LrSchedule(str, Enum):
    cosine = "cosine"
    warmup_hold_decay = "warmup_hold_decay"
    constant = "constant"


class ExportFormat(str, Enum):
    merged = "merged"
    adapter = "adapter"


class ExportDtype(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    pass


@dataclass(kw_only=True, slots=True)
class TrainingConfig(TaskConfig):
    max_steps: int
    """Optimizer steps."""
    max_time: str | None
    """Wall-clock limit, ``[D-]HH:MM:SS`` from the start of the run's processes: it saves, and ends as PREEMPTED."""
    global_batch_size: int
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int | str
    """Sequences per forward pass of one rank, or auto."""
    sequence_length: int
    """Tokens; longer rows are cut."""
    warmup_steps: int
    """Optimizer steps over which the learning rate rises from 0."""
    lr_schedule: LrSchedule
    """How the learning rate goes on after its warm-up."""
    min_lr_ratio: float
    """Final learning rate as a fraction of ``lr``, of the schedules that decay."""
    decay_ratio: float
    """Part of ``max_steps`` that ``warmup_hold_decay`` decays in."""
    weight_decay: float
    clip_grad: float
    """Maximum norm of the gradient; 0 turns clipping off."""
    val_check_interval: int
    """Optimizer steps between validations; step 0 and the last step are always validated."""
    checkpoint_interval: int
    """Optimizer steps between checkpoints; the last step is always saved."""
    async_save: bool
    """Training goes on while a checkpoint is written."""
    keep_last: int
    """How many of the newest checkpoints stay on disk."""
    keep_best: int
    """How many with the lowest validation loss stay beside them, of those whose step was validated."""
    log_interval: int
    """Optimizer steps between lines of metrics.jsonl."""
    sample_prompts: int
    """How many of the validation set's are answered before and after; 0 for none."""
    sample_tokens: int
    """At most, of each answer."""

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
    def rows_per_pass(self) -> int:
        """``micro_batch_size`` of a plan, which has it settled."""
        assert isinstance(self.micro_batch_size, int)
        return self.micro_batch_size

    @property
    def is_packed(self) -> bool:
        """Several conversations share a sequence."""
        return False

    @property
    def trained_tokens(self) -> LossOn:
        """The tokens whose loss is trained on."""
        return LossOn.all

    @property
    def decay_steps(self) -> int:
        return max(1, round(self.decay_ratio * self.max_steps))


@dataclass(kw_only=True, slots=True)
class FinetuneConfig(TrainingConfig):
    """Instruction data, rendered by the model's own chat template."""

    loss_on: LossOn
    """Which tokens of a conversation count."""
    packing: bool
    """Several conversations in one training sequence, each attending to itself alone."""

    @property
    def is_packed(self) -> bool:
        return self.packing

    @property
    def trained_tokens(self) -> LossOn:
        return self.loss_on


@dataclass(kw_only=True, slots=True)
class PretrainConfig(TrainingConfig):
    """Raw text: documents joined by the end-of-text token and cut into full sequences."""


@dataclass(kw_only=True, slots=True)
class InspectConfig(TaskConfig):
    """Print what a model is and what this machine can do with it; the sizes are those memory is estimated for."""

    sequence_length: int
    micro_batch_size: int
    micro_batches: int
    """Per rank and step: a pipeline keeps as many in flight as it has stages."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "micro_batch_size", "micro_batches"):
            require(f"task.{name}", getattr(self, name), at_least=1)


@dataclass(kw_only=True, slots=True)
class ExportConfig(TaskConfig):
    """Write what a run trained for transformers and PEFT. All else about the run is in its own config.yaml."""

    run: str
    """Folder of the run."""
    step: int | None
    """Which checkpoint; None for the newest that is whole."""
    output: str | None
    """Folder to make; None for ``export-<format>`` in the run's."""
    format: ExportFormat
    dtype: ExportDtype
    """Of the merged model; ``auto`` keeps the base model's, tensor by tensor."""
    max_shard_size: str
    """Of one safetensors file, like 5GB; also about what memory is needed."""
    push_to: str | None
    """``hf://ORG/NAME`` to upload to; None to keep it here."""

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
