"""``task=generate``: a prompt, or a file of them, answered. No torch: the child process has it."""

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
from qwen_cl.inference.target_model import find_subject, output_file, pinned, resolve_target
from qwen_cl.reporting.console import print_facts


def generate(config: RunConfig, task: GenerateConfig, invocation: Invocation) -> None:
    """Answer a prompt, or those of a file.

    Raises:
        UserError: the model, the run or the prompts are not what they must be; nothing was written.
        RunFailed: the child process failed.
    """
    if (task.prompt is None) == (task.prompts is None):
        raise UserError("task.prompt or task.prompts must be given, and not both: a prompt, or a file of them")
    config = resolve_target(config, task, invocation.overrides)
    output = output_file(task)
    prompts = prompts_of(task)
    subject = find_subject(config, task)
    longest = subject.architecture.longest_sequence
    check_prompts(
        prompts, subject.tokenizer(), subject.small_files, raw=task.raw, longest=longest, new=task.max_new_tokens
    )
    if not task.raw and not has_stop_token(subject.tokenizer()):
        print(missing_stop_token_warning(str(subject.small_files)), file=sys.stderr)
    if config.dry_run:
        facts = [("model", subject.label), ("prompts", str(len(prompts))), ("output", str(output or "the terminal"))]
        print_facts(facts, Console())
        return
    run_child(pinned(config, task, subject), "task=generate")


def prompts_of(task: GenerateConfig) -> list[Prompt]:
    if task.prompt is not None:
        return [one_prompt(task.prompt)]
    assert task.prompts is not None
    return read_prompts(Path(task.prompts).expanduser(), raw=task.raw)
