"""A rank fails, is killed, hangs, or gets a stop signal: the run ends, and its folder says which rank and why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen_cl.launch.local import worker_environment
from qwen_cl.launch.supervisor import RankGroup
from qwen_cl.planning.plan import make_plan
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State
from qwen_cl.training.prepare import write_worker_inputs
from tests.conftest import FEW, ROOT
from tests.support import faulty_rank
from tests.support.exporting import composed
from tests.support.fault_table import Row
from tests.support.ranks import start_rank

pytestmark = pytest.mark.slow

RUN = ["experiment=smoke", "wandb.mode=disabled", "cluster.accelerator=cpu", "cluster.devices=2", "retention=none"]
RUN += [FEW, "model.verify=none", "task.sample_prompts=0", "task.val_check_interval=1000"]
SINCE_THE_LAST = "the steps since the last checkpoint"


class Forked:
    """A rank's process as the group's parent takes it."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.pid: int = process.pid

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code


def run_group(directory: Path, faults: dict[int, str], *overrides: str, timeout_minutes: float = 30) -> RunFolder:
    folder = RunFolder(directory / "run")
    folder.directory.mkdir()
    plan = make_plan(composed(*RUN, *overrides))
    write_worker_inputs(plan, folder)
    folder.update_status(state=State.RUNNING)
    folder.log.touch()
    environment = {**worker_environment(plan.config), "OMP_NUM_THREADS": "1"}

    def start(said: Mapping[str, str]) -> Forked:
        own = {name: value for name, value in said.items() if name not in os.environ}
        arguments = (str(folder.directory), faults)
        return Forked(start_rank(faulty_rank.main, arguments, {**environment, **own}, folder.log))

    group = RankGroup(folder, 2, timeout_minutes)
    try:
        group.run(start)
    finally:
        left = [process for process in group.processes if process.poll() is None]
        for process in left:
            os.kill(process.pid, signal.SIGKILL)
    assert left == []
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_raised_is_the_reason(rank: int, tmp_path: Path, row: Row) -> None:
    folder = run_group(tmp_path, {rank: "raises"})
    status = folder.status()
    assert status.state == "FAILED"
    assert status.reason == f"rank {rank}: ValueError: the adapter of this rank is made of cheese"
    assert status.retriable is False
    assert "gloo" in folder.log.read_text(errors="replace"), "the other rank failed of nothing, so this shows little"
    row("an error in one of two ranks", "FAILED with that rank's error as the reason", SINCE_THE_LAST)


@pytest.mark.parametrize(
    ("fault", "said"), [("SIGSTOP", ", and no heartbeat"), ("spins", ", while the others wait for it")]
)
def test_a_rank_that_hangs_is_named_and_says_where_it_is(
    fault: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], row: Row
) -> None:
    folder = run_group(tmp_path, {1: fault}, timeout_minutes=0.1)
    status = folder.status()
    assert status.state == "FAILED"
    assert status.reason == (f"rank 1 hung: no progress in 0.1 minutes (cluster.timeout_minutes){said}")
    stacks = [line.partition(",")[0] for line in capfd.readouterr().err.splitlines() if line.endswith("stack:")]
    assert stacks == ["Rank 0", "Rank 1"]
    zero, strikes, _ = folder.log.read_text(encoding="utf-8", errors="replace").partition("in _strike")
    assert strikes
    assert "distributed_c10d.py" in zero  # where it waits
    row(
        "one of two ranks hung",
        "FAILED after cluster.timeout_minutes, the rank named, stacks in run.log",
        SINCE_THE_LAST,
    )


def test_ranks_asked_at_different_steps_stop_at_the_same(tmp_path: Path, row: Row) -> None:
    folder = run_group(tmp_path, {1: "SIGTERM"}, "task.max_steps=1000")
    status = folder.status()
    assert (status.state, status.reason) == ("PREEMPTED", "stopped on request")
    assert [path.name for path in folder.checkpoints.iterdir()] == [f"step={faulty_rank.STEP}"]
    assert status.step == faulty_rank.STEP
    row("SIGTERM to one of two ranks", "both stop after the same step and save; PREEMPTED", "nothing")


def test_a_port_that_is_taken_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        status = run_group(tmp_path, {}).status()
    assert status.state == "FAILED"
    assert status.reason == (
        f"MASTER_PORT ({port}) is not available (in use?); set another, or unset it to use a free one"
    )
    row("the port in use", "FAILED at once, the port named; without MASTER_PORT a free one is taken", "nothing")


def test_a_killed_rank_ends_the_command(tmp_path: Path, row: Row) -> None:
    """Start from the command line, send the signal from outside, and check that nothing is left running."""
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir={folder.directory}", *RUN]
    process = subprocess.Popen(
        [*command, "task.max_steps=100000"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: folder.status().step >= 2 or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    victim = next(each for each in family if each.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "FAILED: rank 1 was killed by SIGKILL\n" in stderr
    assert "Traceback" not in stderr
    assert folder.status().retriable is True
    assert not any(each.is_running() for each in family)
    row("kill -9 of one of two ranks", "FAILED, the rank and the signal named; no process is left", SINCE_THE_LAST)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)
