"""A run continues when the launcher's output breaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_cl.launch.local import execute
from qwen_cl.planning.plan import make_plan
from qwen_cl.reporting.output import tolerate_broken_output
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State
from qwen_cl.training.prepare import write_worker_inputs
from tests.conftest import FEW, ROOT
from tests.support.exporting import composed
from tests.support.fault_table import Row
from tests.support.warm import warm_environment

SHORT = ["task.max_steps=2", "task.warmup_steps=1", "task.val_check_interval=2", "task.checkpoint_interval=2", FEW]
SHORT += ["task.sample_prompts=0", "retention=none", "model.verify=none", "wandb.mode=disabled"]


@pytest.mark.slow
def test_a_run_outlives_whoever_read_its_output(tmp_path: Path, row: Row) -> None:
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "launch.py", f"hydra.run.dir={folder.directory}", *SHORT]
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, text=True, env=warm_environment(dict(os.environ))
        ) as launcher,
    ):
        assert launcher.stdout is not None
        assert str(folder.directory) in launcher.stdout.readline()
        launcher.stdout.close()
    status = folder.status()
    assert (launcher.returncode, status.state, status.step) == (0, "COMPLETED", 2), status
    row(
        "the reader of its output exits (as `head` does), and the disk of its error log is full",
        "training continues, COMPLETED",
        "the rest of the output",
    )


def test_it_is_said_once_where_it_can_still_be_read(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        with tolerate_broken_output(tmp_path):
            for _ in range(3):
                print("step", flush=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == (
        f"output cannot be written any more (Broken pipe); the run continues, and its records are in {tmp_path}\n"
    )


def test_a_launcher_that_fails_says_so_in_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    plan = make_plan(composed("cluster.accelerator=cpu", *SHORT))
    write_worker_inputs(plan, folder)
    folder.update_status(state=State.RUNNING)
    watched: list[int] = []

    def fails() -> None:
        watched.append(1)
        raise ValueError("no such column")

    with pytest.raises(ValueError, match="no such column"):
        execute(plan.config, folder, fails)
    assert watched == [1]
    status = folder.status()
    assert (status.state, status.reason) == (State.FAILED, "the launcher failed: ValueError: no such column")
