"""``task=generate`` and ``task=evaluate`` in this process, which has torch already."""

from __future__ import annotations

from qwen_cl.config.task.inference import AnswersConfig, EvaluateConfig, GenerateConfig
from qwen_cl.inference.evaluate import evaluate
from qwen_cl.inference.generate import generate
from qwen_cl.inference.target_model import resolve_target
from qwen_cl.inference.worker import work
from tests.support.exporting import composed
from tests.support.invocations import invocation


def ask(*said: str) -> None:
    """What the child process does once the launcher has checked."""
    config = composed(*said, "cluster.accelerator=cpu")
    assert isinstance(config.task, AnswersConfig)
    work(resolve_target(config, config.task, said))


def check(*said: str) -> None:
    """What the launcher does before it starts a child; nothing is started."""
    config = composed(*said, "dry_run=true")
    if isinstance(config.task, GenerateConfig):
        generate(config, config.task, invocation(*said))
    else:
        assert isinstance(config.task, EvaluateConfig)
        evaluate(config, config.task, invocation(*said))
