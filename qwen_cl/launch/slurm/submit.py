"""A run into Slurm's queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qwen_cl.config.cluster import SlurmConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.launch.slurm import commands
from qwen_cl.launch.slurm.job_status import CANCELLED
from qwen_cl.launch.slurm.script import SCRIPT, render_script, submitting_environment
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import JobRecord, State, now


def submit(
    cluster: SlurmConfig,
    config: RunConfig,
    folders: Sequence[RunFolder],
    write: Callable[[], None],
    sweep: Path | None = None,
) -> list[str]:
    """Numbers of the jobs, which are elements of one array where there are several folders. ``write`` fills the
    folders; the jobs wait until it has.

    Raises:
        UserError: Slurm does not take it, or what ``write`` raises. Nothing is in the queue then.
        SlurmSilent: it took it, and then did not answer.
    """
    script = render_script(cluster, config, folders, sweep)
    number = commands.submit(script, submitting_environment(cluster))
    numbers = [number] if len(folders) == 1 else [f"{number}_{index}" for index in range(len(folders))]
    try:
        write()
        (folders[0].directory / SCRIPT if sweep is None else sweep / f"job-{number}.sh").write_text(
            script, encoding="utf-8"
        )
        for folder, own in zip(folders, numbers):
            (folder.directory / CANCELLED).unlink(missing_ok=True)
            job = JobRecord(cluster="slurm", id=own, submitted=now())
            folder.update_status(state=State.SUBMITTED, phase="in the queue", job=job)
    except BaseException:
        commands.cancel(number)
        raise
    commands.release(number)
    return numbers
