"""Start a training run on this machine, or submit it."""

from __future__ import annotations

import time
from dataclasses import replace

from rich.console import Console
from rich.filesize import decimal

from qwen_cl.config.cluster import SlurmConfig
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import save_config
from qwen_cl.data.chat.settings import chat_facts
from qwen_cl.data.corpus.text_dataset import summarize_validation
from qwen_cl.data.statistics_text import summary
from qwen_cl.launch.local import execute
from qwen_cl.launch.slurm.follow import follow, follow_hint
from qwen_cl.launch.slurm.submit import submit
from qwen_cl.planning.micro_batch import retry_on_oom
from qwen_cl.planning.plan import Plan
from qwen_cl.reporting.console import ProgressView, print_facts, print_result, wandb_notice
from qwen_cl.reporting.forgetting import draw_report
from qwen_cl.reporting.output import tolerate_broken_output
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.manifest import VerifyProgress
from qwen_cl.runs.metrics import read_metrics
from qwen_cl.runs.resume import Resumption
from qwen_cl.training.prepare import initialize_run_folder

SLOW_TO_READ = 5e9
"""Bytes."""


def _start(plan: Plan, folder: RunFolder, invocation: Invocation, *, automatic: bool) -> None:
    """Run on this machine. ``automatic``: the micro batch was chosen for the user, and may be reduced if it does not
    fit."""
    started = time.monotonic()
    console = Console()

    def attempt(config: RunConfig) -> None:
        tried = replace(plan, config=config)
        resumption = initialize_run_folder(tried, folder, _checking(console), invocation)
        if config.resume is not plan.config.resume:  # set here, to resume with a smaller micro batch
            save_config(replace(config, resume=plan.config.resume), folder.config)
        _print_plan(tried, folder, console, resumption)
        if automatic:
            print_facts(
                [("micro batch", f"{config.training.resolved_micro_batch_size} (task.micro_batch_size=auto)")], console
            )
        with ProgressView(folder, config.training.max_steps, console) as view:
            try:
                execute(config, folder, view.update)
            finally:
                _draw(plan, folder)

    with folder.lock(), tolerate_broken_output(folder.directory):
        if automatic:
            retry_on_oom(plan.config, folder, attempt)
        else:
            attempt(plan.config)
        if notice := wandb_notice(folder.status()):
            console.print(notice, highlight=False, soft_wrap=True, markup=False)
        print_result(folder, console, time.monotonic() - started)


def _submit(plan: Plan, cluster: SlurmConfig, folder: RunFolder, invocation: Invocation) -> None:
    console = Console()
    opened: list[Resumption] = []

    def write() -> None:
        opened.append(initialize_run_folder(plan, folder, _checking(console), invocation))

    with folder.lock():
        (number,) = submit(cluster, plan.config, [folder], write)
    _print_plan(plan, folder, console, opened[0])
    console.print(f"submitted as job {number}. {follow_hint(folder)}", highlight=False, soft_wrap=True, markup=False)
    if cluster.follow:
        follow(folder, console)


def _print_plan(plan: Plan, folder: RunFolder, console: Console, resumption: Resumption) -> None:
    device = plan.device
    console.print(
        f"{plan.model.source} on {device.name} ({device.precision.value}), {folder.directory}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    print_facts([("resume", note) for note in resumption.notes], console)
    if plan.data_report is not None:
        print_facts([*chat_facts(plan.config.data), *summary(plan.data_report)], console)
    if plan.text is not None:
        print_facts([summarize_validation(plan.text)], console)


def _checking(console: Console) -> VerifyProgress:
    """Return a progress callback that prints one line if verifying a checkpoint will take a while."""
    announced: list[int] = []

    def show(done: int, total: int) -> None:
        if total > SLOW_TO_READ and not announced:
            announced.append(total)
            console.print(f"verifying the checksums of a checkpoint of {decimal(total)} …", highlight=False)

    return show


def _draw(plan: Plan, folder: RunFolder) -> None:
    """Draw the report of what was recorded, however the run ended."""
    if folder.metrics_file.exists():
        title = f"{folder.directory.parent.name}/{folder.directory.name}, {plan.model.source}"
        draw_report(read_metrics(folder), title, folder.report)
