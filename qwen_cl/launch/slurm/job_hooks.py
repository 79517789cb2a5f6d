"""Run before and after the workers of a batch script: ``python -m qwen_cl.launch.slurm.job_hooks start|end …``."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

from qwen_cl.config.cluster import SlurmConfig
from qwen_cl.config.errors import EXIT_PREEMPTED
from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.launch.slurm import commands
from qwen_cl.launch.slurm.job_status import CANCELLED, seconds_of
from qwen_cl.reporting.forgetting import draw_report
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.metrics import read_metrics
from qwen_cl.runs.status import State, now

EXIT_OF: dict[State | None, int] = {State.COMPLETED: 0, State.PREEMPTED: EXIT_PREEMPTED}


def start(folder: RunFolder) -> int:
    """Record that the job has started."""
    status, nodes = folder.status(), os.environ["SLURM_JOB_NODELIST"]
    before = seconds_of(status) if status.job.end else status.job.seconds_before
    job = replace(status.job, nodes=nodes, restarts=_restarts(), seconds_before=before, start=now(), end=None)
    folder.mark_running(phase=f"starting on {nodes}", job=job)
    return 0


def end(folder: RunFolder, returncode: int) -> int:
    """Record how the job ended, draw the report, and requeue a preempted run.

    ``returncode`` is that of srun. Returns the job's exit code, which is 0 only for a run whose status is COMPLETED.
    """
    _resolve_status(folder, returncode)
    folder.update_status(job=replace(folder.status().job, end=now()))
    if folder.metrics_file.exists():
        title = f"{folder.directory.parent.name}/{folder.directory.name}, {folder.status().model_source}"
        draw_report(read_metrics(folder), title, folder.report)
    state = folder.status().state
    if state is State.PREEMPTED:
        _requeue(folder)
    return EXIT_OF.get(state, 1)


def _requeue(folder: RunFolder) -> None:
    """Requeue the job, unless it reached the limit or the run was cancelled.

    Slurm ends this script as soon as it requeues the job, so the status is written before.
    """
    number, limit, restarts = os.environ["SLURM_JOB_ID"], _max_requeues(folder), _restarts()
    before = folder.status()
    try:
        if restarts >= limit or (folder.directory / CANCELLED).exists() or not commands.may_requeue(number):
            return
        again = f"{before.reason} at step {before.step}; requeued, {restarts + 1} of {limit}"
        folder.update_status(state=State.SUBMITTED, reason=again, phase="requeued", end=None)
        commands.requeue(number)
    except commands.SlurmUnavailable as error:
        reason = f"{before.reason}; not requeued: {error}"
        folder.update_status(state=State.PREEMPTED, reason=reason, phase=before.phase, end=now())


def _max_requeues(folder: RunFolder) -> int:
    register_schemas()
    cluster = load_config(folder.config).cluster
    return cluster.max_requeues if isinstance(cluster, SlurmConfig) else 0


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _resolve_status(folder: RunFolder, returncode: int) -> None:
    """Record the final status of workers that ended without recording one."""
    number = returncode - 128
    if number in (signal.SIGTERM, signal.SIGUSR1):  # they had no signal handler yet
        folder.finish(State.PREEMPTED, "stopped before training began", FailureKind.interrupted)
        return
    killed = number in set(signal.Signals)
    how = f"a worker was killed by {signal.Signals(number).name}" if killed else f"the workers exited with {returncode}"
    folder.finish(State.FAILED, how, FailureKind.rank_lost, retriable=True)


def main(action: str, directory: str, returncode: str = "0") -> int:
    folder = RunFolder(directory)
    return start(folder) if action == "start" else end(folder, int(returncode))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
