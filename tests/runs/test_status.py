"""status.json: its types, its earlier versions, and several processes that write it at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from qwen_cl.config.errors import UserError
from qwen_cl.runs.failure import FailureKind, SaveError, failure_kind_of
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import JobRecord, RunStatus, State, WandbRecord, parse_status

ROOT = Path(__file__).resolve().parents[2]

WRITER = """
import sys
from qwen_cl.runs.folder import RunFolder
folder, name, times = RunFolder(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(times):
    folder.update_status(**{name: f"{number}"})
"""

FINISHER = """
import sys
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.status import State
print("ready", flush=True)
sys.stdin.readline()
RunFolder(sys.argv[1]).finish(State.FAILED, sys.argv[2], FailureKind.error)
"""

UPDATER = """
import sys
from qwen_cl.runs.folder import RunFolder
folder, step = RunFolder(sys.argv[1]), 0
while True:
    step += 1
    folder.update_status(step=step)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def write(folder: RunFolder, record: object) -> None:
    folder.status_file.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    names = ("model_source", "device", "git_commit", "bos_token")
    writers = [start(WRITER, tmp_path, name, 100) for name in names]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * len(names)
    status = RunFolder(tmp_path).status()
    assert [getattr(status, name) for name in names] == ["99"] * len(names)


def test_the_first_final_status_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.mark_running(phase="training")
    finishers = [start(FINISHER, tmp_path, f"reason {number}") for number in range(3)]
    for finisher in finishers:
        assert finisher.stdout is not None
        assert finisher.stdout.readline() == "ready\n"
    for finisher in finishers:
        finisher.communicate("\n", timeout=60)
    first = folder.status()
    assert first.state is State.FAILED
    assert first.reason in {"reason 0", "reason 1", "reason 2"}
    folder.finish(State.COMPLETED)
    assert folder.status() == first


def test_one_that_runs_again_has_nothing_of_its_earlier_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.mark_running()
    folder.finish(State.FAILED, "no", FailureKind.hung, retriable=True)
    assert folder.status().end is not None
    folder.mark_running()
    assert folder.status() == RunStatus(state=State.RUNNING)


def test_a_writer_that_is_killed_keeps_nobody_from_writing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for _ in range(5):
        updater = start(UPDATER, tmp_path)
        before = folder.status().step
        while folder.status().step == before:
            time.sleep(0.01)
        updater.kill()
        updater.communicate()
        folder.update_status(step=0)
        assert folder.status().step == 0


def test_a_writer_that_is_stopped_keeps_nobody_from_the_final_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_cl.runs.folder.STATUS_LOCK_SECONDS", 0.2)
    folder = RunFolder(tmp_path)
    folder.mark_running()
    updater = start(UPDATER, tmp_path)
    lock = FileLock(tmp_path / ".status.lock")
    held = False
    while not held:  # stopped while it holds the lock
        time.sleep(0.01)
        os.kill(updater.pid, signal.SIGSTOP)
        try:
            lock.acquire(blocking=False)
        except TimeoutError:
            held = True
        else:
            lock.release()
            os.kill(updater.pid, signal.SIGCONT)
    folder.finish(State.FAILED, "rank 1 was hanging", FailureKind.hung)
    assert folder.status().reason == "rank 1 was hanging"
    updater.kill()
    updater.communicate()


def test_fields_of_earlier_versions_are_read_and_rewritten_under_their_new_names(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    old = {"state": "FAILED", "reason": "no", "worker_lost": True, "began": {"starting": 1.5}, "data_hash": "ab"}
    write(folder, {**old, "levers": {"graphs": 4, "low_rank_products": 8}})
    status = folder.status()
    assert (status.retriable, status.phase_started_at) == (True, {"starting": 1.5})
    assert (status.speed_optimizations, status.data_sha256) == ({"graphs": 4, "fused_lora": 8}, "ab")
    folder.update_status(phase="training")
    record = json.loads(folder.status_file.read_text(encoding="utf-8"))
    assert not record.keys() & {"worker_lost", "began", "levers", "data_hash"}
    assert list(folder.status().phase_started_at) == ["starting", "training"]
    assert folder.status().retriable


def test_fields_of_later_versions_stay(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write(folder, {"state": "RUNNING", "colour": "red", "wandb": {"id": "a", "url": "u", "team": "t"}})
    folder.update_status(step=3, wandb=WandbRecord(id="b", mode="offline"))
    record = json.loads(folder.status_file.read_text(encoding="utf-8"))
    assert record["colour"] == "red"
    assert record["wandb"] == {"id": "b", "mode": "offline", "team": "t"}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.mark_running(start=None)
    folder.finish(State.PREEMPTED, "task.max_time is up", FailureKind.time_limit)
    end = folder.status().end
    assert end is not None
    folder.update_status(job=JobRecord(id="7", end=end, seconds_before=1.5), start=end)
    status = folder.status()
    assert status.job == JobRecord(id="7", end=end, seconds_before=1.5)
    assert (status.start, status.end, status.seconds) == (end, end, 0.0)
    assert status.failure_kind is FailureKind.time_limit


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "it must be an object of names and values"),
        ({"step": "three"}, "step (three) must be a whole number"),
        ({"step": True}, "step (True) must be a whole number"),
        ({"state": "RUNING"}, "state (RUNING) must be one of SUBMITTED, RUNNING, COMPLETED, FAILED, PREEMPTED"),
        ({"state": ["RUNNING"]}, "state (['RUNNING']) must be one of SUBMITTED"),
        ({"job": 7}, "job (7) must be an object of names and values"),
        ({"job": {"id": 7}}, "job.id (7) must be text"),
        ({"start": "yesterday"}, "start (yesterday) must be a time with its zone, like 2"),
        ({"end": "2026-01-01T00:00:00"}, "end (2026-01-01T00:00:00) must be a time with its zone"),
        ({"peak_memory_gib": "1"}, "peak_memory_gib (1) must be a number"),
        ({"versions": []}, "versions ([]) must be an object of names and values"),
    ],
)
def test_a_value_of_another_kind_is_named(record: object, message: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write(folder, record)
    before = folder.status_file.read_bytes()
    for act in (folder.status, folder.update_status, folder.mark_running):
        with pytest.raises(UserError) as refused:
            act()
        assert str(refused.value).startswith(f"{folder.status_file}: {message}")
    assert folder.status_file.read_bytes() == before


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for content in (b"{", b"\xff", b""):
        folder.status_file.write_bytes(content)
        with pytest.raises(UserError, match=r"status\.json is not JSON: "):
            folder.status()


@pytest.mark.parametrize(
    ("state", "reason", "kind"),
    [
        ("FAILED", "rank 1: OutOfMemoryError: CUDA out of memory", FailureKind.out_of_memory),
        ("FAILED", "ranks 0, 1 were killed by SIGKILL; the kernel was out of memory", FailureKind.out_of_memory),
        ("FAILED", "NoRoomError: no room for a checkpoint in /x: the disk is full. What …", FailureKind.disk_full),
        ("FAILED", "FloatingPointError: training loss is nan at step 3; lower lr", FailureKind.not_finite),
        ("FAILED", "rank 1 was hanging: no progress in 2 minutes (cluster.timeout_minutes)", FailureKind.hung),
        ("FAILED", "the worker was killed by SIGKILL (out of memory?)", FailureKind.rank_lost),
        ("FAILED", "ValueError: no", FailureKind.error),
        ("PREEMPTED", "pruned: its validation loss at step 2 (4.0000) is not among the best 1 in 2", "pruned"),
        ("PREEMPTED", "stopped on request at step 3", FailureKind.interrupted),
        ("PREEMPTED", "task.max_time is up", FailureKind.time_limit),
        ("COMPLETED", None, None),
    ],
)
def test_a_failure_that_an_earlier_version_recorded_has_its_kind(state: str, reason: str | None, kind: Any) -> None:
    assert parse_status({"state": state, "reason": reason}).failure_kind == kind


def test_what_ends_a_process_has_its_kind() -> None:
    class OutOfMemoryError(RuntimeError):
        """An error with the name of torch's."""

    inf = "Unexpected result inf (message='found Inf in local grad norm for bucket #0')"
    kinds = {
        OutOfMemoryError("CUDA out of memory"): FailureKind.out_of_memory,
        OSError(28, "No space left on device"): FailureKind.disk_full,
        FloatingPointError("training loss is nan"): FailureKind.not_finite,
        RuntimeError(inf): FailureKind.not_finite,
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"): FailureKind.collective_failed,
        SaveError("OutOfMemoryError: CUDA", FailureKind.out_of_memory): FailureKind.out_of_memory,
        UserError("no"): FailureKind.invalid_input,
        ValueError("no"): FailureKind.error,
    }
    assert {error: failure_kind_of(error) for error in kinds} == kinds
