"""``task=report``: find the runs, and write their page."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from rich.console import Console

from qwen_cl.config.errors import UserError
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.overrides import refuse_ignored
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.report import ReportConfig
from qwen_cl.files.atomic import atomic_write
from qwen_cl.reporting.console import print_facts
from qwen_cl.reporting.figures import draw_plots
from qwen_cl.reporting.page import render_page
from qwen_cl.reporting.run_summary import RunSummary, read_trial, read_trials
from qwen_cl.reporting.tracking.identity import sync_command
from qwen_cl.reporting.tracking.workspace import publish, require_publishable
from qwen_cl.runs.folder import RunFolder

PAGE = "report.html"
FILES = ("loss-curves", "lr-rank", "pareto")
"""The plots that are also files in a sweep's folder."""


def report(config: RunConfig, task: ReportConfig, invocation: Invocation) -> None:
    """Write the page of the runs of a folder, or of one run.

    Raises:
        UserError: there are no runs, or the page cannot be written.
    """
    refuse_ignored(invocation.overrides, ("wandb", "dry_run"), "the report only reads the folder")
    if (task.sweep is None) == (task.run is None):
        raise UserError("set either task.sweep (a folder of runs) or task.run (the folder of one run)")
    directory, trials = _find(task)
    output = _expanded(task.output) if task.output is not None else directory / PAGE
    facts = [("runs", str(len(trials))), ("page", str(output))]
    if task.publish:
        require_publishable()
    if not config.dry_run:
        _write(output, render_page(trials, f"{directory.parent.name}/{directory.name}"))
        if task.publish:
            facts += publish(config.wandb, directory.name, trials)
    if command := sync_command(directory):
        facts += [
            ("upload", command),
            ("view locally", f"wandb leet {shlex.quote(str(directory / 'wandb'))}"),
        ]
    print_facts(facts, Console())


def write_report(directory: Path) -> list[Path]:
    """Write the page of a folder of runs and its plots as files; return their paths, the page first.

    Raises:
        UserError: there are no runs, or a file cannot be written.
    """
    trials = read_trials(directory)
    written = [directory / PAGE]
    _write(written[0], render_page(trials, f"{directory.parent.name}/{directory.name}"))
    for plot in draw_plots(trials):
        if plot.name in FILES:
            written.append(directory / f"{plot.name}.png")
            _write(written[-1], plot.png)
    return written


def _find(task: ReportConfig) -> tuple[Path, list[RunSummary]]:
    if task.sweep is not None:
        directory = _expanded(task.sweep)
        if not directory.is_dir():
            raise UserError(f"task.sweep ({directory}) is not a folder; name one like outputs/sweeps/TIME")
        return directory, read_trials(directory)
    assert task.run is not None
    folder = RunFolder(_expanded(task.run))
    trial = read_trial(folder) if folder.config.is_file() and folder.status_file.is_file() else None
    if trial is None:
        raise UserError(
            f"task.run ({folder.directory}) is not the folder of a training run; for a folder of runs write "
            "task.sweep=FOLDER"
        )
    return folder.directory, [trial]


def _write(output: Path, content: str | bytes) -> None:
    try:
        with atomic_write(output) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written: {error.strerror}; choose another with task.output=FILE"
        ) from error


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 - Path's raises on an unknown user
