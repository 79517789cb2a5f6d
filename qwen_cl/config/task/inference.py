"""The tasks that ask a finished model: ``task=generate`` and ``task=evaluate``. Values live in conf/task/*.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.config.errors import UserError
from qwen_cl.config.replay import check_names
from qwen_cl.config.task.training import LossOn, TaskConfig
from qwen_cl.config.validation import require


@dataclass(kw_only=True, slots=True)
class AnswersConfig(TaskConfig):
    """A model and what it writes. The model is ``model=…``, or what a run made of it."""

    run: str | None
    """Folder of a run; None for the model as it is."""
    step: int | None
    """Which of the run's checkpoints; None for the newest that is whole."""
    prompts: str | None
    """A text file with a prompt a line, or a file of rows with ``prompt`` or ``messages``."""
    raw: bool
    """Continue the prompt as it stands, without the chat template."""
    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token each time."""
    top_p: float
    """Tokens are drawn from the likeliest that together have this probability."""
    batch_size: int
    """Sequences at a time."""
    output: str | None
    """File to write; None for none."""

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
    """The one prompt; None where ``prompts`` has them."""

    def __post_init__(self) -> None:
        AnswersConfig.__post_init__(self)
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("task.prompt is empty; write what the model shall answer")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(AnswersConfig):
    sets: dict[str, str]
    """Files by the name their results get."""
    sequence_length: int
    """Tokens the model sees at once; longer rows are cut, texts go on in the next sequence."""
    loss_on: LossOn
    """Which tokens of a conversation count."""
    lm_eval: list[str]
    """Tasks of lm-evaluation-harness."""
    lm_eval_include: str | None
    """Directory with task files of your own."""

    def __post_init__(self) -> None:
        AnswersConfig.__post_init__(self)
        require("task.sequence_length", self.sequence_length, at_least=2)
        check_names("task.sets", self.sets)
        if self.lm_eval_include is not None and not self.lm_eval:
            raise UserError("task.lm_eval_include has task files, and task.lm_eval names none of them to run")
