"""``task=continual``: run the stages in order, stop at the first that fails, and resume there the next time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from qwen_cl.config.cluster import Precision
from qwen_cl.config.errors import RunFailed, RunPreempted
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.override_text import printed_path
from qwen_cl.config.overrides import quoted
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import save_config
from qwen_cl.config.task.continual import ContinualConfig
from qwen_cl.continual.child_process import launch
from qwen_cl.continual.comparison import write_comparison
from qwen_cl.continual.evaluation import StageLosses, check_evaluation, evaluate_stage
from qwen_cl.continual.matrix import write_matrix
from qwen_cl.continual.stage_state import archive, is_finished, record_stage
from qwen_cl.continual.stages import MERGED, Stage, plan_stages
from qwen_cl.models.adapter_methods import adapter_of
from qwen_cl.reporting.console import console_for_tables, print_facts
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State, now


def continual(config: RunConfig, task: ContinualConfig, invocation: Invocation) -> None:
    """Run the stages of ``task.stages`` that are not completed yet.

    Raises:
        UserError: a stage or a set is invalid, or a completed stage was run with other settings or data.
        RunFailed: a stage, or an evaluation, did not complete.
    """
    directory = invocation.output_dir
    stages = plan_stages(task, invocation.overrides, directory)
    if task.sets:
        check_evaluation(task, stages[0])
    if config.dry_run:
        _print_plan(stages)
        return
    folder = RunFolder(directory)
    with folder.lock():
        done = _done(stages)
        if not folder.config.exists():
            save_config(config, folder.config)
        folder.mark_running(start=now(), stages=_states(stages))
        try:
            rows = _run(task, stages, done, folder)
        except (RunFailed, KeyboardInterrupt) as error:
            stopped = isinstance(error, RunPreempted | KeyboardInterrupt)
            state = State.PREEMPTED if stopped else State.FAILED
            kind = FailureKind.interrupted if stopped else _failure_kind(stages)
            folder.finish(state, str(error), kind, stages=_states(stages))
            raise
        folder.finish(State.COMPLETED, stages=_states(stages))
    if task.sets:
        write_matrix(task, rows, directory, console_for_tables())
    write_comparison(stages, directory, console_for_tables())
    facts = [("state", "COMPLETED"), ("plot", str(folder.report)), ("last stage", str(stages[-1].folder.directory))]
    print_facts(facts, Console())


def _done(stages: list[Stage]) -> list[Stage]:
    """Return the finished stages whose initial stage is finished too; with another initial model they run again."""
    done: list[Stage] = []
    for stage in stages:
        if is_finished(stage) and (stage.start is None or stage.start in done):
            done.append(stage)
    return done


def _run(task: ContinualConfig, stages: list[Stage], done: list[Stage], folder: RunFolder) -> list[StageLosses]:
    advice = f"the same command with {printed_path('hydra.run.dir', folder.directory)} resumes there"
    rows = []
    if task.sets:
        rows.append(evaluate_stage(task, stages[0], None, folder.directory / "00-before", advice))
    for stage in stages:
        note = " is already completed" if stage in done else ""
        print(f"stage {stage.number} of {len(stages)}: {stage.name}{note}", flush=True)
        if stage not in done:
            _train(stage, advice, lambda: folder.update_status(stages=_states(stages)))
        if adapter_of(stage.config.peft) is not None and any(later.start is stage for later in stages):
            _export(stage, advice)
        if task.sets:
            rows.append(evaluate_stage(task, stages[0], stage, stage.folder.directory, advice))
    return rows


def _train(stage: Stage, advice: str, record: Callable[[], None]) -> None:
    archive(stage)
    record_stage(stage)
    record()
    try:
        launch(f"stage {stage.name}", stage.folder.directory, stage.overrides, advice)
    finally:
        record()
    if not is_finished(stage):
        raise RunFailed(f"FAILED in stage {stage.name}: {stage.folder.status_file} is not COMPLETED; {advice}")


def _export(stage: Stage, advice: str) -> None:
    """Export the merged model, which a later stage starts from.

    It is in fp32 after training in fp32: rounding to the base's bf16 would lose some of the update.
    """
    output = stage.folder.directory / MERGED
    if output.exists():
        return
    fp32 = stage.plan.config.cluster.precision is Precision.fp32
    overrides = [
        "task=export",
        f"task.run={quoted(str(stage.folder.directory))}",
        f"task.dtype={'fp32' if fp32 else 'auto'}",
    ]
    launch(f"the export of {stage.name}", stage.folder.directory / "export", overrides, advice)


def _failure_kind(stages: list[Stage]) -> FailureKind:
    """Return the failure kind of the stage that failed."""
    failed = (status for stage in stages if (status := stage.folder.status()).state is State.FAILED)
    return next((status.failure_kind for status in failed if status.failure_kind), FailureKind.error)


def _states(stages: list[Stage]) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            "folder": stage.folder.directory.name,
            "init_from": None if stage.start is None else stage.start.name,
            "state": stage.folder.status().state or "PENDING",
        }
        for stage in stages
    ]


def _print_plan(stages: list[Stage]) -> None:
    for stage in stages:
        start = stage.plan.model.source if stage.start is None else f"the result of {stage.start.name}"
        facts = [
            ("stage", f"{stage.number} {stage.name}"),
            ("starts from", start),
            ("folder", str(stage.folder.directory)),
            ("overrides", " ".join(stage.overrides)),
        ]
        print_facts(facts, Console())
