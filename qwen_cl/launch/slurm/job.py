"""Run ``task=job``: show, follow or cancel a submitted run, given its folder."""

from __future__ import annotations

import os
import shutil
import sys

from rich.console import Console

from qwen_cl.config.errors import UserError
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.overrides import refuse_ignored
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.job import JobAction, JobConfig
from qwen_cl.launch.slurm import commands
from qwen_cl.launch.slurm.commands import Job
from qwen_cl.launch.slurm.follow import follow
from qwen_cl.launch.slurm.job_status import CANCELLED, refresh, request_end
from qwen_cl.reporting.console import print_facts
from qwen_cl.runs.folder import RunFolder


def run_job_action(config: RunConfig, task: JobConfig, invocation: Invocation) -> None:
    """Show, follow or cancel a submitted run.

    Raises:
        UserError: the folder is not that of a submitted run.
        RunFailed: Slurm does not answer, or the followed run failed.
    """
    refuse_ignored(invocation.overrides, [], "the run's config is in its folder")
    folder = _find(task.run)
    if task.action is JobAction.logs:
        _print_logs(folder)
        return
    console = Console()
    if task.action is JobAction.follow:
        follow(folder, console)
    elif task.action is JobAction.cancel:
        _cancel(folder, console)
    else:
        _print_status(folder, console)


def _find(directory: str) -> RunFolder:
    folder = RunFolder(os.path.expanduser(directory))  # noqa: PTH111 - Path's raises on an unknown user
    status = folder.status()
    if status.job.id is None:
        what = "not the folder of a run: it has no status.json" if status.state is None else "a run on this machine"
        raise UserError(f"task.run ({folder.directory}) is {what}; task=job is for runs that were submitted")
    return folder


def _print_status(folder: RunFolder, console: Console) -> None:
    job = refresh(folder)
    status = folder.status()
    facts = [("state", f"{status.state} at step {status.step}")]
    if status.reason:
        facts.append(("reason", status.reason))
    facts.append(("job", f"{status.job.id}: over" if job is None else str(job)[4:]))
    if status.job.nodes and status.job.start:
        facts.append(("nodes", f"{status.job.nodes}, since {status.job.start.isoformat()}"))
    print_facts([*facts, ("folder", str(folder.directory)), ("log", str(folder.log))], console)


def _print_logs(folder: RunFolder) -> None:
    try:
        with folder.log.open("rb") as log:
            shutil.copyfileobj(log, sys.stdout.buffer)
    except FileNotFoundError as error:
        raise UserError(f"{folder.log} does not exist yet: the job has not started") from error
    sys.stdout.buffer.flush()


def _cancel(folder: RunFolder, console: Console) -> None:
    job = refresh(folder)
    if job is None:
        state = folder.status().state
        raise UserError(f"task.run ({folder.directory}) is {state} already; there is nothing to cancel")
    console.print(_end(folder, job), highlight=False, soft_wrap=True, markup=False)
    refresh(folder)


def _end(folder: RunFolder, job: Job) -> str:
    if job.state == "RUNNING" and not (folder.directory / CANCELLED).exists():
        request_end(folder, job.id)
        return f"job {job.id} saves a checkpoint and ends. Cancel again to end it at once."
    commands.cancel(job.id)
    return f"job {job.id} is cancelled"
