"""``task=generate``: answers to a prompt or to a file of prompts. The child process generates them, with torch."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from qwen_cl.config.errors import UserError
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.inference import GenerateConfig
from qwen_cl.data.chat.stop_tokens import has_stop_token, missing_stop_token_warning
from qwen_cl.inference.child_process import run_child
from qwen_cl.inference.prompts import Prompt, check_prompts, one_prompt, read_prompts
from qwen_cl.inference.target_model import find_target_model, output_file, pinned, resolve_target
from qwen_cl.reporting.console import print_facts


def generate(config: RunConfig, task: GenerateConfig, invocation: Invocation) -> None:
    """Generate an answer to each prompt.

    Raises:
        UserError: the model, the run or a prompt is invalid; nothing was written.
        RunFailed: the child process failed.
    """
    if (task.prompt is None) == (task.prompts is None):
        raise UserError("set either task.prompt (one prompt) or task.prompts (a file of prompts)")
    config = resolve_target(config, task, invocation.overrides)
    output = output_file(task)
    prompts = task_prompts(task)
    target = find_target_model(config, task)
    longest = target.architecture.longest_sequence
    check_prompts(
        prompts, target.tokenizer(), target.small_files, raw=task.raw, longest=longest, new=task.max_new_tokens
    )
    if not task.raw and not has_stop_token(target.tokenizer()):
        print(missing_stop_token_warning(str(target.small_files)), file=sys.stderr)
    if config.dry_run:
        facts = [("model", target.label), ("prompts", str(len(prompts))), ("output", str(output or "the terminal"))]
        print_facts(facts, Console())
        return
    run_child(pinned(config, task, target), "task=generate")


def task_prompts(task: GenerateConfig) -> list[Prompt]:
    """Return the prompts of ``task.prompt`` or ``task.prompts``."""
    if task.prompt is not None:
        return [one_prompt(task.prompt)]
    assert task.prompts is not None
    return read_prompts(Path(task.prompts).expanduser(), raw=task.raw)
