"""``task=evaluate``: losses on named sets, samples, benchmarks. No torch: the child process has it."""

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
    find_subject,
    output_file,
    pinned,
    require_length,
    resolve_target,
)
from qwen_cl.inference.trained_run import find_base
from qwen_cl.reporting.console import print_facts


def evaluate(config: RunConfig, task: EvaluateConfig, invocation: Invocation) -> None:
    """Measure a model on every set of ``task.sets``.

    Raises:
        UserError: the model, the run, a set or a prompt is not what it must be; nothing was written.
        RunFailed: the child process failed.
    """
    task = replace(task, sets=local_sets(task.sets, "task.sets"))
    config, subject = plan_evaluation(replace(config, task=task), task, invocation.overrides)
    if config.dry_run:
        facts = [("model", subject.label), ("sets", ", ".join(task.sets) or "none")]
        print_facts([*facts, ("output", task.output or "the terminal")], Console())
        return
    run_child(pinned(config, task, subject), "task=evaluate")


def plan_evaluation(config: RunConfig, task: EvaluateConfig, overrides: Sequence[str]) -> tuple[RunConfig, TargetModel]:
    """Settled config and checked model; the sets and prompts are checked too. Raises UserError."""
    if not task.sets and not task.lm_eval and task.prompts is None:
        raise UserError(
            "task=evaluate has nothing to do; name sets like 'task.sets={japanese: ja.jsonl}', task.prompts or "
            "task.lm_eval"
        )
    config = resolve_target(config, task, overrides)
    output_file(task)
    _check_harness(task)
    sets = read_sets(task.sets, "task.sets")
    subject = find_subject(config, task)
    require_length(task.sequence_length, subject.architecture)
    tokenizer = subject.tokenizer()
    for named in sets:
        if not named.is_text:
            check_chat_template(tokenizer, str(subject.small_files), "evaluate on text")
        score_set(named, tokenizer, task.sequence_length, task.loss_on)
    _check_samples(task, subject)
    return config, subject


def _check_samples(task: EvaluateConfig, subject: TargetModel) -> None:
    if task.prompts is None:
        return
    prompts = read_prompts(Path(task.prompts).expanduser(), raw=task.raw)
    longest = subject.architecture.longest_sequence
    check_prompts(
        prompts, subject.tokenizer(), subject.small_files, raw=task.raw, longest=longest, new=task.max_new_tokens
    )
    if subject.run is not None:
        find_base(subject.run, ", or leave task.prompts out: its base answers them too")


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
