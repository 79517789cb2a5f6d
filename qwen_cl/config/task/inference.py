"""The settings of task=generate and task=evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.config.errors import UserError
from qwen_cl.config.replay import check_names
from qwen_cl.config.task.training import LossOn, TaskConfig
from qwen_cl.config.validation import require


@dataclass(kw_only=True, slots=True)
class AnswersConfig(TaskConfig):
    """The generation settings of a model, given by ``model=…`` or a run."""

    run: str | None
    """Folder of a run; None for the base model."""
    step: int | None
    """Step of the run's checkpoint; None for the latest valid one."""
    prompts: str | None
    """A text file with one prompt per line, or a file of rows with ``prompt`` or ``messages``."""
    raw: bool
    """Continue the prompt as raw text, without the chat template."""
    max_new_tokens: int
    temperature: float
    """Sampling temperature; 0 for greedy decoding."""
    top_p: float
    """Probability mass of the most likely tokens to sample from."""
    batch_size: int
    """Sequences per batch."""
    output: str | None
    """Output file, or None."""

    def __post_init__(self) -> None:
        require("task.max_new_tokens", self.max_new_tokens, at_least=1)
        require("task.temperature", self.temperature, at_least=0)
        require("task.top_p", self.top_p, above=0, at_most=1)
        require("task.batch_size", self.batch_size, at_least=1)
        if self.run is not None and not self.run.strip():
            raise UserError("task.run is empty; name the folder of a run, or null for the model as it is")
        if self.step is not None and self.run is None:
            raise UserError(f"task.step ({self.step}) is a checkpoint of a run; name the run in task.run")
        if self.output is not None and not self.output.strip():
            raise UserError("task.output is empty; name a file to write, or null for none")


@dataclass(kw_only=True, slots=True)
class GenerateConfig(AnswersConfig):
    prompt: str | None
    """A single prompt; None with ``prompts``."""

    def __post_init__(self) -> None:
        AnswersConfig.__post_init__(self)
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("task.prompt is empty; write a prompt for the model")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(AnswersConfig):
    sets: dict[str, str]
    """Files of the evaluation sets, by name."""
    sequence_length: int
    """Tokens per sequence; longer rows are truncated, texts continue in the next sequence."""
    loss_on: LossOn
    """Loss tokens of a conversation."""
    lm_eval: list[str]
    """Tasks of lm-evaluation-harness."""
    lm_eval_include: str | None
    """Directory with custom task files."""

    def __post_init__(self) -> None:
        AnswersConfig.__post_init__(self)
        require("task.sequence_length", self.sequence_length, at_least=2)
        check_names("task.sets", self.sets)
        if self.lm_eval_include is not None and not self.lm_eval:
            raise UserError("task.lm_eval_include has task files, and task.lm_eval names none of them to run")
