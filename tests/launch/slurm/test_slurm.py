"""cluster=slurm against a real Slurm of two nodes: submitted, followed, preempted, cancelled, lost, swept."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.config.overrides import quoted
from qwen_cl.launch.slurm import commands
from qwen_cl.launch.slurm.job_status import refresh
from qwen_cl.runs.folder import RunFolder
from tests.conftest import ROOT, launch
from tests.support.job_task import job_task
from tests.support.slurm_cluster import slurm_cluster, why_not
from tests.support.sweeping import start_sweep, states, trial_folders, write_data

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

SUBMIT = ["cluster=slurm", "cluster.accelerator=cpu"]
SMALL = ["experiment=smoke", "wandb.mode=disabled", "model.verify=none", "task.sample_prompts=0"]
SEARCH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""Where cluster.setup is to find a Python."""
CANARIES = {name: f"canary-{name.lower()}" for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as conf, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        yield


def submit(directory: Path, *arguments: str) -> RunFolder:
    done = launch(*SMALL, *SUBMIT, "cluster.follow=false", *arguments, directory=directory)
    assert done.returncode == 0, done.stderr
    return done.folder


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(holds: Callable[[], Any], folder: RunFolder, launcher: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 200
    while not holds():
        said = folder.log.read_text()[-3000:] if folder.log.exists() else "nothing"
        assert launcher is None or launcher.poll() is None, (launcher.communicate(), said)
        assert time.monotonic() < deadline, f"{folder.status()}\n{said}"
        time.sleep(0.1)


def job(folder: RunFolder) -> str:
    return str(folder.status().job.id)


def steps(folder: RunFolder) -> list[int]:
    records = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return [record["step"] for record in records if "train/loss" in record]


def test_two_nodes_preempted_requeued_and_finished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a run's/50% folder")
    arguments = [*SMALL, *SUBMIT, "wandb.mode=offline", "cluster.nodes=2", "cluster.max_requeues=1"]
    last = 100  # some seconds of training: a busy machine takes that long to pass a signal on
    arguments += [f"task.max_steps={last}", f"task.val_check_interval={last}"]
    arguments += ["cluster.setup='export GLOO_SOCKET_IFNAME=lo'"]
    process = start(f"hydra.run.dir={quoted(str(folder.directory))}", *arguments, **CANARIES, PATH=SEARCH)
    wait_until(lambda: folder.status().step >= 2, folder, process)
    commands.signal_steps(job(folder), "USR1")  # what Slurm sends before the time is up (--signal)
    wait_until(lambda: folder.status().state == "SUBMITTED", folder, process)
    stopped = folder.status().step
    assert 2 <= stopped < last
    assert folder.status().reason == f"stopped on request at step {stopped}; requeued, 1 of 1"
    wait_until(lambda: commands.query([job(folder)])[job(folder)].state == "PENDING", folder)
    subprocess.run(["scontrol", "update", f"jobid={job(folder)}", "starttime=now+3"], check=True)  # else 2 minutes
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, (stderr, folder.log.read_text()[-3000:])
    status = folder.status()
    assert (status.state, status.step, status.job.restarts) == ("COMPLETED", last, 1)
    assert status.job.nodes == "n[1-2]"
    assert status.job.seconds_before > 0
    assert [entry["step"] for entry in status.resumed] == [stopped]
    assert steps(folder) == list(range(1, last + 1))
    assert f"submitted as job {job(folder)}. To follow it: python launch.py task=job" in stdout
    assert f"COMPLETED at step {last}" in stdout
    assert (folder.directory / "job.sh").read_text().count("#SBATCH --nodes=2") == 1
    assert_no_secret(tmp_path, stdout + stderr)


def assert_no_secret(directory: Path, said: str) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > 20
    for canary in CANARIES.values():
        assert canary not in said
        assert [path for path in files if canary.encode() in path.read_bytes()] == []


def test_a_run_that_waits_is_shown_guarded_and_cancelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "run")
    follower = start(f"hydra.run.dir={folder.directory}", *SMALL, *SUBMIT, "cluster.options={begin: now+1hour}")
    wait_until(lambda: folder.status().state == "SUBMITTED", folder, follower)
    assert follower.stdout is not None
    said = ""
    while "PENDING" not in said:
        said += follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    _, stderr = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert (
        f"The run continues in the cluster. To follow it: python launch.py task=job task.run={folder.directory}"
        in stderr
    )
    assert "Traceback" not in stderr
    wait_until(lambda: commands.query([job(folder)])[job(folder)].reason == "BeginTime", folder)
    job_task(folder.directory, "status")
    shown = capsys.readouterr().out
    assert "SUBMITTED at step 0" in shown
    assert f"{job(folder)}: PENDING (BeginTime)" in shown
    for arguments in ([], SUBMIT):
        again = launch(*SMALL, *arguments, directory=folder.directory)
        assert again.returncode == 2
        assert f"is in use by job {job(folder)}: PENDING (BeginTime); follow it with task=job" in again.stderr
    with pytest.raises(UserError, match=r"run\.log does not exist yet: the job has not started"):
        job_task(folder.directory, "logs")
    job_task(folder.directory, "cancel")
    assert folder.status().state == "PREEMPTED"
    assert folder.status().reason == f"job {job(folder)}: CANCELLED, before it started"
    with pytest.raises(UserError, match="is PREEMPTED already; there is nothing to cancel"):
        job_task(folder.directory, "cancel")


def test_a_run_that_is_killed_cancelled_or_loses_its_node_does_not_look_alive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at a time, one on each node."""
    killed = submit(tmp_path / "killed", "cluster.options={nodelist: n1}")
    lost = submit(tmp_path / "lost", "cluster.options={nodelist: n2}", "cluster.max_requeues=0")
    wait_until(lambda: lost.status().state == "RUNNING", lost)
    wait_until(lambda: worker(killed), killed)
    follower = start("task=job", f"task.run={lost.directory}", "task.action=follow")
    found = worker(killed)
    assert found is not None
    found.kill()
    wait_until(lambda: refresh(killed) is None, killed)
    status = killed.status()
    assert (status.state, status.reason) == ("FAILED", "a worker was killed by SIGKILL")
    assert status.retriable is True

    cancelled = submit(tmp_path / "cancelled", "cluster.options={nodelist: n1}")
    for process in [*overseers(lost), *processes(lost)]:  # as when the node's power fails
        process.kill()
    down = ["scontrol", "update", "nodename=n2", "state=down", "reason=test"]
    subprocess.run(down, check=True)
    _, stderr = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert f"FAILED: job {job(lost)}: NODE_FAIL" in stderr
    assert (lost.status().state, lost.status().retriable) == ("FAILED", True)
    subprocess.run([*down[:3], "state=resume"], check=False)  # it may be back by itself
    wait_until(lambda: cancelled.status().phase == "importing NeMo", cancelled)
    job_task(cancelled.directory, "cancel")
    assert (
        f"job {job(cancelled)} saves a checkpoint and ends. Cancel again to end it at once." in capsys.readouterr().out
    )
    wait_until(lambda: refresh(cancelled) is None, cancelled)
    assert cancelled.status().state == "PREEMPTED"  # and not requeued
    assert "before training began" in str(cancelled.status().reason)
    job_task(killed.directory, "logs")
    assert capsys.readouterr().out == killed.log.read_text()


def processes(folder: RunFolder) -> list[psutil.Process]:
    """Return the processes of the run's job: the batch script and its children."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            ours = environment.get("SLURM_CONF") == os.environ["SLURM_CONF"]
            if ours and environment.get("SLURM_JOB_ID") == job(folder):
                found.append(process)
    return found


def overseers(folder: RunFolder) -> list[psutil.Process]:
    """Return the processes of Slurm that would report how the job ended."""
    parents = {parent for process in processes(folder) if (parent := process.parent()) is not None}
    return [parent for parent in parents if parent.name() == "slurmstepd"]


def worker(folder: RunFolder, rank: int = 0) -> psutil.Process | None:
    for process in processes(folder):
        with suppress(psutil.Error):
            ours = process.cmdline()[1:] == ["-m", "qwen_cl.training.worker", str(folder.directory)]
            if ours and process.environ()["SLURM_PROCID"] == str(rank):
                return process
    return None


def test_a_rank_that_hangs_on_another_node_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    arguments = [*SMALL, *SUBMIT, "cluster.nodes=2", "cluster.timeout_minutes=0.3", "task.max_steps=1000"]
    process = start(
        f"hydra.run.dir={folder.directory}", *arguments, "cluster.setup='export GLOO_SOCKET_IFNAME=lo'", PATH=SEARCH
    )
    wait_until(lambda: folder.status().step >= 2, folder, process)
    hanging = worker(folder, rank=1)
    assert hanging is not None
    hanging.send_signal(signal.SIGSTOP)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    reason = "rank 1 hung: no progress in 0.3 minutes (cluster.timeout_minutes), and no heartbeat"
    assert (folder.status().state, folder.status().reason) == ("FAILED", reason)
    assert reason in stderr
    log = folder.log.read_text(errors="replace")
    assert len(re.findall(r"line \d+ in _run_module_as_main", log)) == 2  # where each is: the main thread's first frame
    wait_until(lambda: not processes(folder), folder)


def test_a_node_without_the_compiler_that_an_optimization_needs_says_so(tmp_path: Path) -> None:
    asked = ["speed.compile=always", "task.packing=false", "cluster.setup='export CXX=nowhere'"]
    process = start(f"hydra.run.dir={tmp_path / 'run'}", *SMALL, *SUBMIT, *asked, PATH=SEARCH)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    reason = str(RunFolder(tmp_path / "run").status().reason)
    assert reason.startswith(f"speed.compile=always: there is no C compiler on {platform.node()} (")
    assert reason.endswith("; load one in cluster.setup, or set speed.compile=never")
    assert reason in stderr


def test_what_slurm_refuses_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    done = launch(*SMALL, *SUBMIT, "cluster.partition=nope", directory=tmp_path / "run")
    assert done.returncode == 2
    assert "cluster=slurm: sbatch refused the job: " in done.stderr
    assert "invalid partition specified: nope" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_an_array_that_continues_when_it_is_left(tmp_path: Path) -> None:
    base = [*write_data(tmp_path / "data"), *SUBMIT, "lr=1e-3,1e-4"]
    directory = tmp_path / "sweep"
    first = start_sweep(directory, *base)
    wait_until(lambda: set(states(directory).values()) & {"RUNNING"}, RunFolder(directory))
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate(timeout=60)
    assert first.returncode == 130, stderr
    assert "The jobs keep running; the same command finds them again." in stdout
    assert "PREEMPTED: " in stderr
    numbers = {name: job(folder) for name, folder in trial_folders(directory).items()}
    array = numbers["00"].partition("_")[0]
    assert numbers == {"00": f"{array}_0", "01": f"{array}_1"}

    second = start_sweep(directory, *base)
    stdout, stderr = second.communicate(timeout=300)
    assert second.returncode == 0, (stderr, [folder.status() for folder in trial_folders(directory).values()])
    assert states(directory) == {"00": "COMPLETED", "01": "COMPLETED"}
    assert {name: job(folder) for name, folder in trial_folders(directory).items()} == numbers
    results = json.loads((directory / "sweep.json").read_text())["results"]
    for result in results:
        records = trial_folders(directory)[f"{result['number']:02}"].metrics_file.read_text().splitlines()
        losses = [line["val/target/loss"] for line in map(json.loads, records) if "val/target/loss" in line]
        assert (result["val_loss"], result["attempts"]) == (losses[-1], 1)
    assert [result["number"] for result in results] == [0, 1]  # the higher rate learns more in two steps
    assert len((directory / "sweep.csv").read_text().splitlines()) == 3
