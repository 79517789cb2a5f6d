"""One run from its config: check, then show what would happen, or make it happen."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console

from qwen_cl.checkpoints.manifest import Progress
from qwen_cl.config.answers import EvaluateConfig, GenerateConfig
from qwen_cl.config.data import TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.file import save_config
from qwen_cl.config.forgetting import GeneratedReplayConfig
from qwen_cl.config.report import ReportConfig
from qwen_cl.config.schema import RunConfig, SlurmConfig
from qwen_cl.config.stages import ContinualConfig
from qwen_cl.config.tasks import ExportConfig, InspectConfig
from qwen_cl.continual.report import draw_report
from qwen_cl.data.corpus.target import save_target, summarise_validation
from qwen_cl.data.report_text import report_page, summary
from qwen_cl.estimate import batch_of, estimate_memory
from qwen_cl.execute import ROOT, execute
from qwen_cl.plan import Plan, fetch_weights, make_plan, with_text
from qwen_cl.resume import Resumption, resume
from qwen_cl.run_folder import RunFolder, State, git_commit, now, versions
from qwen_cl.source.fingerprint import fingerprint
from qwen_cl.source.small_files import copy_small_files
from qwen_cl.view import ProgressView, print_facts, print_result, read_metrics, wandb_notice

SLOW_TO_READ = 5e9
"""Bytes."""


def run(config: object) -> None:
    """``config`` is what Hydra composed, typed. The output folder is Hydra's.

    Raises:
        UserError: refused; nothing was written.
        RunFailed: started, and did not complete.
    """
    config = cast(RunConfig, config)
    if _done_without_training(config, list(HydraConfig.get().overrides.task)):
        return
    folder = RunFolder(HydraConfig.get().runtime.output_dir)
    plan = make_plan(config)
    if plan.config.dry_run:
        from qwen_cl.preview import print_plan

        print_plan(plan, folder)
        return
    if isinstance(plan.config.cluster, SlurmConfig):
        raise UserError("cluster=slurm cannot submit yet; dry_run=true shows the batch script")
    if isinstance(plan.config.data, TextDataConfig):
        plan = with_text(plan, plan.config.data)
    fetch_weights(plan)
    if isinstance(plan.config.replay, GeneratedReplayConfig):
        from qwen_cl.inference.self_replay import with_sampled_text

        plan = replace(plan, config=with_sampled_text(plan.config, plan.config.replay))
    _start(plan, folder)


def _done_without_training(config: RunConfig, overrides: list[str]) -> bool:
    """The tasks that are no run of their own; False where the task is a run."""
    task = config.task
    if isinstance(task, InspectConfig):
        from qwen_cl.inspection import inspect

        inspect(config, task)
    elif isinstance(task, ExportConfig):
        from qwen_cl.export import export

        export(config, task, overrides)
    elif isinstance(task, EvaluateConfig):
        from qwen_cl.inference.evaluate import evaluate

        evaluate(config, task, overrides)
    elif isinstance(task, GenerateConfig):
        from qwen_cl.inference.generate import generate

        generate(config, task, overrides)
    elif isinstance(task, ContinualConfig):
        from qwen_cl.chain.continual import continual

        continual(config, task, overrides, Path(HydraConfig.get().runtime.output_dir))
    elif isinstance(task, ReportConfig):
        from qwen_cl.report.report import report

        report(config, task, overrides)
    else:
        return False
    return True


def _start(plan: Plan, folder: RunFolder) -> None:
    started = time.monotonic()
    console = Console()
    with folder.lock():
        resumption = open_run(plan, folder, _checking(console))
        device = plan.device
        console.print(
            f"{plan.model.source} on {device.name} ({device.precision.value}), {folder.directory}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        print_facts([("resume", note) for note in resumption.notes], console)
        if plan.data_report is not None:
            print_facts(summary(plan.data_report), console)
        if plan.text is not None:
            print_facts([summarise_validation(plan.text)], console)
        with ProgressView(folder, plan.config.training.max_steps, console) as view:
            try:
                execute(plan.config, folder, view.update)
            finally:
                _draw(plan, folder)
        if notice := wandb_notice(folder.status()):
            console.print(notice, highlight=False, soft_wrap=True, markup=False)
        print_result(folder, console, time.monotonic() - started)


def _draw(plan: Plan, folder: RunFolder) -> None:
    """However the run ended: what it measured until then is worth a look."""
    if folder.metrics_file.exists():
        title = f"{folder.directory.parent.name}/{folder.directory.name}, {plan.model.source}"
        draw_report(read_metrics(folder), title, folder.report)


def _facts(plan: Plan) -> dict[str, str | None]:
    """What the config alone does not tell of what a run is."""
    return {
        "data.hash": plan.data_hash,
        "model.fingerprint": _fingerprint(plan),
        "model.tokenizer": plan.tokenizer_hash,
    }


def _fingerprint(plan: Plan) -> str | None:
    """Of a directory; a commit needs none."""
    return fingerprint(plan.model.directory) if plan.model.commit is None else None


def _checking(console: Console) -> Progress:
    """Says so once where reading a checkpoint takes a while."""
    said: list[int] = []

    def show(done: int, total: int) -> None:
        if total > SLOW_TO_READ and not said:
            said.append(total)
            console.print(f"comparing a checkpoint of {total / 1e9:.1f} GB with its manifest …", highlight=False)

    return show


def open_run(plan: Plan, folder: RunFolder, progress: Progress | None = None) -> Resumption:
    """Everything that says what this run is, before it starts.

    Raises:
        UserError: the folder holds another run, or one that cannot be gone on with. Nothing was changed.
    """
    resumption = resume(folder, plan.config, _facts(plan), progress)
    folder.keep_reserve()
    write_worker_inputs(plan, folder)
    if HydraConfig.initialized():
        _write_hydra(folder)
    if plan.data_report is not None:
        folder.data_report.write_text(report_page(plan.data_report), encoding="utf-8")
        record = json.dumps(asdict(plan.data_report), indent=2, ensure_ascii=False)
        folder.data_report_json.write_text(record + "\n", encoding="utf-8")
    folder.update_status(
        state=State.RUNNING,
        reason=None,
        phase="starting",
        start=folder.status().get("start") or now(),
        end=None,
        step=0 if resumption.checkpoint is None else resumption.checkpoint.step,
        worker_lost=None,
        model_source=plan.model.source,
        model_commit=plan.model.commit,
        model_fingerprint=_fingerprint(plan),
        data_hash=plan.data_hash,
        trainable_parameters=_trainable_parameters(plan),
        tokenizer_hash=plan.tokenizer_hash,
        git_commit=git_commit(ROOT),
        versions=versions(),
        device=plan.device.name,
    )
    return resumption


def _write_hydra(folder: RunFolder) -> None:
    hydra = folder.directory / ".hydra"
    hydra.mkdir(exist_ok=True)
    OmegaConf.save(HydraConfig.get().overrides.task, hydra / "overrides.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": {"runtime": HydraConfig.get().runtime}}), hydra / "hydra.yaml")
    shutil.copyfile(folder.config, hydra / "config.yaml")


def _trainable_parameters(plan: Plan) -> int:
    config = plan.config
    estimate = estimate_memory(
        plan.architecture, batch_of(config), config.peft, config.cluster, config.cluster.precision
    )
    return estimate.trainable_parameters


def write_worker_inputs(plan: Plan, folder: RunFolder) -> None:
    """What the run's processes read: the config, and the tokenizer. Not the model's own directory, because NeMo
    copies the tokenizer's into every checkpoint, weights and all."""
    copy_small_files(plan.model.directory, folder.tokenizer)
    save_config(plan.config, folder.config)
    if plan.text is not None:
        save_target(plan.text, folder.text_target)
