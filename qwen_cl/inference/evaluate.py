"""``task=evaluate``: losses on named sets, samples and benchmarks. The child process computes them, with torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from qwen_cl.config.errors import UserError
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.inference import EvaluateConfig
from qwen_cl.data.chat.encode import check_chat_template
from qwen_cl.data.eval_sets import local_sets, read_sets, score_set
from qwen_cl.inference.child_process import run_child
from qwen_cl.inference.prompts import check_prompts, read_prompts
from qwen_cl.inference.target_model import (
    TargetModel,
    find_target_model,
    output_file,
    pinned,
    require_length,
    resolve_target,
)
from qwen_cl.inference.trained_run import find_base
from qwen_cl.reporting.console import print_facts


def evaluate(config: RunConfig, task: EvaluateConfig, invocation: Invocation) -> None:
    """Evaluate a model on ``task.sets``, ``task.prompts`` and ``task.lm_eval``.

    Raises:
        UserError: the model, the run, a set or a prompt is invalid; nothing was written.
        RunFailed: the child process failed.
    """
    task = replace(task, sets=local_sets(task.sets, "task.sets"))
    config, target = plan_evaluation(replace(config, task=task), task, invocation.overrides)
    if config.dry_run:
        facts = [("model", target.label), ("sets", ", ".join(task.sets) or "none")]
        print_facts([*facts, ("output", task.output or "the terminal")], Console())
        return
    run_child(pinned(config, task, target), "task=evaluate")


def plan_evaluation(config: RunConfig, task: EvaluateConfig, overrides: Sequence[str]) -> tuple[RunConfig, TargetModel]:
    """Return the resolved config and the checked model, after checking the sets and prompts too.

    Raises:
        UserError: the model, the run, a set or a prompt is invalid.
    """
    if not task.sets and not task.lm_eval and task.prompts is None:
        raise UserError(
            "task=evaluate has nothing to evaluate; set task.sets, for example 'task.sets={japanese: ja.jsonl}', "
            "task.prompts or task.lm_eval"
        )
    config = resolve_target(config, task, overrides)
    output_file(task)
    _check_harness(task)
    sets = read_sets(task.sets, "task.sets")
    target = find_target_model(config, task)
    require_length(task.sequence_length, target.architecture)
    tokenizer = target.tokenizer()
    for named in sets:
        if not named.is_text:
            check_chat_template(tokenizer, str(target.small_files), "evaluate on text")
        score_set(named, tokenizer, task.sequence_length, task.loss_on)
    _check_samples(task, target)
    return config, target


def _check_samples(task: EvaluateConfig, target: TargetModel) -> None:
    if task.prompts is None:
        return
    prompts = read_prompts(Path(task.prompts).expanduser(), raw=task.raw)
    longest = target.architecture.longest_sequence
    check_prompts(
        prompts, target.tokenizer(), target.small_files, raw=task.raw, longest=longest, new=task.max_new_tokens
    )
    if target.run is not None:
        find_base(target.run, ", or remove task.prompts, which the base model answers too")


def _check_harness(task: EvaluateConfig) -> None:
    if not task.lm_eval:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "task.lm_eval needs lm-evaluation-harness, which is not installed: pip install -c constraints.txt -e "
            "'.[lm_eval]'"
        )
    if task.lm_eval_include is not None and not Path(task.lm_eval_include).expanduser().is_dir():
        raise UserError(f"task.lm_eval_include ({task.lm_eval_include}) must be a directory with task files")
