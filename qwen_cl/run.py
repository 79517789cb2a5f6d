"""One run from its config: check, then show what would happen, or make it happen."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib import import_module
from typing import cast

from rich.console import Console
from rich.filesize import decimal

from qwen_cl.checkpoints.manifest import Progress
from qwen_cl.cluster.follow import follow, later
from qwen_cl.cluster.submission import submit
from qwen_cl.cluster.truth import require_no_job
from qwen_cl.config.answers import EvaluateConfig, GenerateConfig
from qwen_cl.config.clusters import ContainerConfig, SlurmConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.file import save_config
from qwen_cl.config.forgetting import GeneratedReplayConfig
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.job import JobConfig
from qwen_cl.config.report import ReportConfig
from qwen_cl.config.schema import RunConfig
from qwen_cl.config.stages import ContinualConfig
from qwen_cl.config.tasks import (
    ExportConfig,
    FinetuneConfig,
    InspectConfig,
    PretrainConfig,
    TaskConfig,
    TrainingConfig,
)
from qwen_cl.continual.report import draw_report
from qwen_cl.data.chat_settings import chat_facts, kept_template_date
from qwen_cl.data.corpus.target import summarise_validation
from qwen_cl.data.report_text import summary
from qwen_cl.execute import execute
from qwen_cl.micro_batch import is_automatic, keep_micro_batch, until_it_fits
from qwen_cl.opening import open_run, ready
from qwen_cl.output import enduring_output
from qwen_cl.plan import Plan, make_plan
from qwen_cl.resume import Resumption, keep_datasets
from qwen_cl.run_folder import RunFolder
from qwen_cl.view import ProgressView, print_facts, print_result, read_metrics, wandb_notice

SLOW_TO_READ = 5e9
"""Bytes."""


TASKS: dict[type[TaskConfig], str] = {
    FinetuneConfig: "qwen_cl.run.train",
    PretrainConfig: "qwen_cl.run.train",
    InspectConfig: "qwen_cl.inspection.inspect",
    ExportConfig: "qwen_cl.export.export",
    EvaluateConfig: "qwen_cl.inference.evaluate.evaluate",
    GenerateConfig: "qwen_cl.inference.generate.generate",
    ContinualConfig: "qwen_cl.chain.continual.continual",
    JobConfig: "qwen_cl.cluster.job.act",
    ReportConfig: "qwen_cl.report.report.report",
}
"""The function of each task, by name: a command imports no other task's. It takes the config, its task typed, and the
invocation."""


def run(config: object, invocation: Invocation) -> None:
    """Do what ``task`` says. ``config`` is what Hydra composed, typed.

    Raises:
        UserError: refused; nothing was written.
        RunFailed: started, and did not complete.
    """
    config = cast(RunConfig, config)
    module, _, name = TASKS[type(config.task)].rpartition(".")
    getattr(import_module(module), name)(config, config.task, invocation)


def train(config: RunConfig, task: TrainingConfig, invocation: Invocation) -> None:
    """Plan a run, then show it, submit it, or run it here, in Hydra's output folder."""
    folder = RunFolder(invocation.output_dir)
    made_on = kept_template_date([folder.config])
    plan = make_plan(keep_datasets(keep_micro_batch(config, folder), folder), made_on=made_on)
    if plan.config.dry_run:
        from qwen_cl.preview import print_plan

        print_plan(plan, folder, invocation.overrides)
        return
    if isinstance(plan.config.cluster, ContainerConfig):
        raise UserError(
            f"cluster={invocation.choices['cluster']} is not submitted from here; dry_run=true shows what to submit"
        )
    require_no_job(folder)
    plan = ready(plan)
    if isinstance(plan.config.replay, GeneratedReplayConfig):
        from qwen_cl.inference.self_replay import with_sampled_text

        plan = replace(plan, config=with_sampled_text(plan.config, plan.config.replay))
    if isinstance(plan.config.cluster, SlurmConfig):
        _submit(plan, plan.config.cluster, folder, invocation)
    else:
        _start(plan, folder, invocation, automatic=is_automatic(config))


def _start(plan: Plan, folder: RunFolder, invocation: Invocation, *, automatic: bool) -> None:
    """Run it here. ``automatic``: its micro batch is ours to choose, also when the one that was chosen does not fit."""
    started = time.monotonic()
    console = Console()

    def attempt(config: RunConfig) -> None:
        tried = replace(plan, config=config)
        resumption = open_run(tried, folder, _checking(console), invocation)
        if config.resume is not plan.config.resume:  # ours, to go on with fewer rows
            save_config(replace(config, resume=plan.config.resume), folder.config)
        _print_plan(tried, folder, console, resumption)
        if automatic:
            print_facts([("micro batch", f"{config.training.rows_per_pass} (task.micro_batch_size=auto)")], console)
        with ProgressView(folder, config.training.max_steps, console) as view:
            try:
                execute(config, folder, view.update)
            finally:
                _draw(plan, folder)

    with folder.lock(), enduring_output(folder.directory):
        if automatic:
            until_it_fits(plan.config, folder, attempt)
        else:
            attempt(plan.config)
        if notice := wandb_notice(folder.status()):
            console.print(notice, highlight=False, soft_wrap=True, markup=False)
        print_result(folder, console, time.monotonic() - started)


def _submit(plan: Plan, cluster: SlurmConfig, folder: RunFolder, invocation: Invocation) -> None:
    console = Console()
    opened: list[Resumption] = []

    def write() -> None:
        opened.append(open_run(plan, folder, _checking(console), invocation))

    with folder.lock():
        (number,) = submit(cluster, plan.config, [folder], write)
    _print_plan(plan, folder, console, opened[0])
    console.print(f"submitted as job {number}. {later(folder)}", highlight=False, soft_wrap=True, markup=False)
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
        print_facts([summarise_validation(plan.text)], console)


def _checking(console: Console) -> Progress:
    """Return what says so, once, where reading a checkpoint takes a while."""
    said: list[int] = []

    def show(done: int, total: int) -> None:
        if total > SLOW_TO_READ and not said:
            said.append(total)
            console.print(f"comparing a checkpoint of {decimal(total)} with its manifest …", highlight=False)

    return show


def _draw(plan: Plan, folder: RunFolder) -> None:
    """However the run ended: what it measured until then is worth a look."""
    if folder.metrics_file.exists():
        title = f"{folder.directory.parent.name}/{folder.directory.name}, {plan.model.source}"
        draw_report(read_metrics(folder), title, folder.report)
