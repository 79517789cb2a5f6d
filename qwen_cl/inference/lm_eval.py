"""Benchmarks with lm-evaluation-harness. Their data must be local or cached, as the child process is offline."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import RunFailed, UserError
from qwen_cl.config.task.inference import EvaluateConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: EvaluateConfig, seed: int
) -> dict[str, dict[str, Any]]:
    """Return the harness's metrics (``acc,none``) by task.

    Raises:
        UserError: the harness has no such task.
        RunFailed: the harness failed, most often because its data is not cached.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # The harness's own catalog of thousands of files takes half a minute to read.
    manager = TaskManager(include_path=task.lm_eval_include, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in task.lm_eval):
        manager = TaskManager(include_path=task.lm_eval_include)
    for name in task.lm_eval:
        if not manager.match_tasks([name]):
            where = f"nor in {task.lm_eval_include}" if task.lm_eval_include else "(task.lm_eval_include=DIRECTORY)"
            raise UserError(f"task.lm_eval: the harness has no task {name}, {where}")
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=task.batch_size),
            tasks=list(task.lm_eval),
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:  # a task file, its data or its code can raise anything
        text = " ".join(str(error).split())[:300]
        raise RunFailed(f"lm-evaluation-harness failed: {type(error).__name__}: {text}") from error
    return {
        name: {key: value for key, value in metrics.items() if key != "alias"}
        for name, metrics in found["results"].items()
    }
