"""The status of a submitted run before and after its workers, and errors for other folders. No Slurm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.config.saved import save_config
from qwen_cl.launch.slurm.job_hooks import main
from qwen_cl.launch.slurm.job_status import refresh, require_no_job, seconds_of
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.metrics import MetricsTail
from qwen_cl.runs.status import parse_status
from tests.support.composed_configs import compose_run
from tests.support.job_task import job_task

T = "2026-01-01T00:00:00+00:00"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Create the folder of a run in its second and last start."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[3-4]")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    folder = RunFolder(tmp_path)
    save_config(compose_run("cluster=slurm", "cluster.max_requeues=1"), folder.config)
    folder.update_status(state="SUBMITTED", reason="stopped", end=T, step=4, job={"id": "7"})
    return folder


def test_at_its_start_a_run_is_running_and_its_ranks_know_where_to_meet(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("start", str(folder.directory)) == 0
    status = folder.status()
    assert (status.state, status.reason, status.end, status.step) == ("RUNNING", None, None, 4)
    assert status.phase == "starting on n[3-4]"
    job = status.job
    assert (job.id, job.nodes, job.restarts) == ("7", "n[3-4]", 1)


def test_workers_start_where_only_their_container_has_torch(folder: RunFolder) -> None:
    """They are told where to meet, and what they end with is the step's."""
    without_torch = (
        "import sys; sys.modules['torch'] = None\n"
        "from qwen_cl.launch.slurm.srun_supervisor import main\nsys.exit(main(*sys.argv[1:]))"
    )
    command = [sys.executable, "-c", without_torch, str(folder.directory)]
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}
    for worker, code in (("echo $MASTER_ADDR:$MASTER_PORT; exit 3", 3), ("kill -9 $$", 137)):
        done = subprocess.run(
            [*command, "sh", "-c", worker], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        said, *printed = done.stdout.splitlines()
        assert said == "torch is only in the container: hung ranks will not be detected."
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+", line) for line in printed)
        assert len(printed) == (code == 3)


def test_what_every_start_took_is_counted(folder: RunFolder) -> None:
    first = {"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T00:01:30+00:00"}
    folder.update_status(job={"id": "7", "seconds_before": 30.0, **first})
    main("start", str(folder.directory))
    assert folder.status().job.seconds_before == 120.0
    assert folder.status().job.end is None
    main("start", str(folder.directory))  # the node went down meanwhile: nobody knows for how long it trained
    assert folder.status().job.seconds_before == 120.0
    folder.update_status(state="COMPLETED", model_source="x")
    assert main("end", str(folder.directory)) == 0
    job = folder.status().job
    assert job.start is not None
    assert job.end is not None
    assert job.start <= job.end
    assert 120 <= seconds_of(folder.status()) < 180


@pytest.mark.parametrize(
    ("job", "end", "seconds"),
    [
        ({}, "2026-01-01T09:00:00+00:00", 0.0),  # it only waited
        ({"start": T, "end": "2026-01-01T01:00:00+00:00"}, "2026-01-01T09:00:00+00:00", 3600.0),  # then waited again
        ({"start": T, "seconds_before": 60.0}, "2026-01-01T00:10:00+00:00", 660.0),  # its node went down
    ],
)
def test_time_in_the_queue_costs_nothing(job: dict[str, Any], end: str, seconds: float) -> None:
    assert seconds_of(parse_status({"job": job, "end": end})) == seconds


@pytest.mark.parametrize(
    ("said", "returncode", "state", "reason", "exit_code"),
    [
        ({"state": "COMPLETED"}, 0, "COMPLETED", None, 0),
        ({"state": "COMPLETED"}, 137, "COMPLETED", None, 0),
        ({"state": "FAILED", "reason": "ValueError: no"}, 1, "FAILED", "ValueError: no", 1),
        ({"state": "RUNNING"}, 0, "FAILED", "the workers exited with 0", 1),
        ({"state": "RUNNING"}, 137, "FAILED", "a worker was killed by SIGKILL", 1),
        ({"state": "RUNNING"}, 255, "FAILED", "the workers exited with 255", 1),
        ({"state": "RUNNING"}, 143, "PREEMPTED", "stopped before training began", 75),
        ({"state": "RUNNING"}, 138, "PREEMPTED", "stopped before training began", 75),
        ({"state": "PREEMPTED", "reason": "stopped on request"}, 75, "PREEMPTED", "stopped on request", 75),
    ],
)
def test_at_its_end_the_runs_own_word_counts(
    said: dict[str, str], returncode: int, state: str, reason: str | None, exit_code: int, folder: RunFolder
) -> None:
    folder.update_status(**{"reason": None, **said})
    assert main("end", str(folder.directory), str(returncode)) == exit_code
    assert (folder.status().state, folder.status().reason) == (state, reason)


def test_a_cancelled_run_does_not_go_back(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    (folder.directory / ".cancelled").touch()
    folder.update_status(state="PREEMPTED", reason="stopped on request")
    assert main("end", str(folder.directory), "75") == 75
    assert folder.status().state == "PREEMPTED"


def test_where_slurm_is_silent_a_run_stays_preempted_and_says_so(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv("PATH", str(folder.directory))
    folder.update_status(state="PREEMPTED", reason="stopped on request")
    assert main("end", str(folder.directory), "75") == 75
    status = folder.status()
    assert status.state == "PREEMPTED"
    assert str(status.reason).startswith("stopped on request; not requeued: Slurm does not answer: scontrol")


def test_metrics_that_are_cut_while_somebody_looks_are_read_again(folder: RunFolder) -> None:
    tail = MetricsTail(folder)
    for step in (1, 2, 3):
        folder.append_metrics({"step": step})
    assert [record["step"] for record in tail.new_records()] == [1, 2, 3]
    shorter = folder.metrics_file.with_suffix(".tmp")
    shorter.write_text('{"step": 1}\n')
    shorter.replace(folder.metrics_file)  # as when a run goes on from step 1
    folder.append_metrics({"step": 2, "train/loss": 1.0})
    assert [record["step"] for record in tail.new_records()] == [1, 2]
    assert tail.new_records() == []


def test_a_folder_whose_job_nobody_knows_of_is_left_alone(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder.directory))
    before = folder.status()
    with pytest.raises(UserError, match=r"^hydra.run.dir \(.*\) was submitted, and its Slurm state is unknown"):
        require_no_job(folder)
    assert folder.status() == before


def test_what_is_no_submitted_run_is_refused(tmp_path: Path) -> None:
    def look(run: str, *overrides: str) -> None:
        job_task(run, "status", *overrides)

    with pytest.raises(UserError, match=r"^task.run is empty; name the folder of a run"):
        look(" ")
    with pytest.raises(UserError, match=r"^task.run \(.*\) is not the folder of a run: it has no status.json"):
        look(str(tmp_path))
    RunFolder(tmp_path).update_status(state="COMPLETED")
    with pytest.raises(UserError, match=r"^task.run \(.*\) is a run on this machine; task=job is for runs that were"):
        look(str(tmp_path))
    RunFolder(tmp_path).update_status(state="RUNNING", job=None)  # submitted once, and gone on with here
    assert refresh(RunFolder(tmp_path)) is None
    assert RunFolder(tmp_path).status().state == "RUNNING"
    with pytest.raises(UserError, match=r"is a run on this machine"):
        look(str(tmp_path))
    with pytest.raises(UserError, match=r"^lr=1 has no effect: the run's config is in its folder; remove it$"):
        look(str(tmp_path), "task=job", "lr=1")
