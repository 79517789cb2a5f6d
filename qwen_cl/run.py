"""The entry point of every task: dispatch a composed config to the function of its task."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import cast

from qwen_cl.config.cluster import ContainerConfig, SlurmConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.replay import GeneratedReplayConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.continual import ContinualConfig
from qwen_cl.config.task.export import ExportConfig
from qwen_cl.config.task.inference import EvaluateConfig, GenerateConfig
from qwen_cl.config.task.inspect import InspectConfig
from qwen_cl.config.task.job import JobConfig
from qwen_cl.config.task.report import ReportConfig
from qwen_cl.config.task.training import FinetuneConfig, PretrainConfig, TaskConfig, TrainingConfig
from qwen_cl.data.chat.settings import previous_template_date
from qwen_cl.launch.slurm.job_status import require_no_job
from qwen_cl.planning.data import reuse_datasets
from qwen_cl.planning.micro_batch import is_automatic, reuse_micro_batch
from qwen_cl.planning.plan import make_plan
from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.prepare import fetch_inputs
from qwen_cl.training.start import _start, _submit

TASKS: dict[type[TaskConfig], str] = {
    FinetuneConfig: "qwen_cl.run.train",
    PretrainConfig: "qwen_cl.run.train",
    InspectConfig: "qwen_cl.planning.inspect_model.inspect",
    ExportConfig: "qwen_cl.inference.export.export",
    EvaluateConfig: "qwen_cl.inference.evaluate.evaluate",
    GenerateConfig: "qwen_cl.inference.generate.generate",
    ContinualConfig: "qwen_cl.continual.run_stages.continual",
    JobConfig: "qwen_cl.launch.slurm.job.run_job_action",
    ReportConfig: "qwen_cl.reporting.report.report",
}
"""The function of each task, as a string, so that a command imports only its own.

The arguments are the config, its task, and the invocation.
"""


def run(config: object, invocation: Invocation) -> None:
    """Run the task of ``config``, which is Hydra's composed config as an object.

    Raises:
        UserError: the config is refused; nothing was written.
        RunFailed: the task started, and did not complete.
    """
    config = cast(RunConfig, config)
    module, _, name = TASKS[type(config.task)].rpartition(".")
    getattr(import_module(module), name)(config, config.task, invocation)


def train(config: RunConfig, task: TrainingConfig, invocation: Invocation) -> None:
    """Plan a training run; then print the plan, submit the run, or run it here, in Hydra's output folder."""
    folder = RunFolder(invocation.output_dir)
    run_date = previous_template_date([folder.config])
    plan = make_plan(reuse_datasets(reuse_micro_batch(config, folder), folder), run_date=run_date)
    if plan.config.dry_run:
        from qwen_cl.training.dry_run import print_plan

        print_plan(plan, folder, invocation.overrides)
        return
    if isinstance(plan.config.cluster, ContainerConfig):
        raise UserError(
            f"cluster={invocation.choices['cluster']} cannot be submitted; dry_run=true prints the files to submit"
        )
    require_no_job(folder)
    plan = fetch_inputs(plan)
    if isinstance(plan.config.replay, GeneratedReplayConfig):
        from qwen_cl.inference.self_replay import with_sampled_text

        plan = replace(plan, config=with_sampled_text(plan.config, plan.config.replay))
    if isinstance(plan.config.cluster, SlurmConfig):
        _submit(plan, plan.config.cluster, folder, invocation)
    else:
        _start(plan, folder, invocation, automatic=is_automatic(config))
