"""The tasks generate and evaluate in this process, which has imported torch."""

from __future__ import annotations

from qwen_cl.config.task.inference import AnswersConfig, EvaluateConfig, GenerateConfig
from qwen_cl.inference.evaluate import evaluate
from qwen_cl.inference.generate import generate
from qwen_cl.inference.target_model import resolve_target
from qwen_cl.inference.worker import work
from tests.support.exporting import composed
from tests.support.invocations import invocation


def ask(*overrides: str) -> None:
    """Do what the child process does after the launcher's checks."""
    config = composed(*overrides, "cluster.accelerator=cpu")
    assert isinstance(config.task, AnswersConfig)
    work(resolve_target(config, config.task, overrides))


def check(*overrides: str) -> None:
    """Do what the launcher does before it starts a child process; nothing is started."""
    config = composed(*overrides, "dry_run=true")
    if isinstance(config.task, GenerateConfig):
        generate(config, config.task, invocation(*overrides))
    else:
        assert isinstance(config.task, EvaluateConfig)
        evaluate(config, config.task, invocation(*overrides))
