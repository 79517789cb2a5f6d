"""``task=job`` in this process."""

from __future__ import annotations

from qwen_cl.config.task.job import JobConfig
from qwen_cl.launch.slurm.job import run_job_action
from tests.support.exporting import composed
from tests.support.invocations import invocation


def job_task(run: object, action: str, *overrides: str) -> None:
    """``task=job`` in this process."""
    config = composed("task=job", f"task.run='{run}'", f"task.action={action}", *overrides)
    assert isinstance(config.task, JobConfig)
    run_job_action(config, config.task, invocation(*overrides))
