"""Submit a run to Slurm."""

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
    """Submit one job, or a job array for several folders, and return the job numbers.

    ``write`` fills the folders; the jobs are on hold until it has.

    Raises:
        UserError: Slurm refuses the job, or ``write`` fails. Nothing is in the queue then.
        SlurmUnavailable: Slurm took the job and then stopped answering.
    """
    script = render_script(cluster, config, folders, sweep)
    number = commands.submit(script, submitting_environment(cluster))
    numbers = [number] if len(folders) == 1 else [f"{number}_{index}" for index in range(len(folders))]
    try:
        write()
        (folders[0].directory / SCRIPT if sweep is None else sweep / f"job-{number}.sh").write_text(
            script, encoding="utf-8"
        )
        for folder, job_id in zip(folders, numbers):
            (folder.directory / CANCELLED).unlink(missing_ok=True)
            job = JobRecord(cluster="slurm", id=job_id, submitted=now())
            folder.update_status(state=State.SUBMITTED, phase="in the queue", job=job)
    except BaseException:
        commands.cancel(number)
        raise
    commands.release(number)
    return numbers
