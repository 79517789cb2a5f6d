"""Failure modes and recovery of a run. Each test checks a line of docs/faults.md (see tests/support/fault_table.py)."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.runs.checkpoints import PARTIAL, complete_checkpoints, latest_valid_checkpoint
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.manifest import verify
from tests.conftest import ROOT
from tests.support.fault_table import Row
from tests.support.interrupted_runs import (
    AtRecord,
    AtSave,
    copy_of,
    measured,
    overrides_of,
    rates,
    start,
    train,
    watch_files,
    whole_and_killed,
)

pytestmark = pytest.mark.slow

LORA = overrides_of("lora")
NOTHING = "nothing: losses equal those of an uninterrupted run to the last bit"


@pytest.fixture(scope="module")
def runs(shared_directory: Path) -> tuple[RunFolder, RunFolder]:
    """Return an uninterrupted run, and the same run killed with checkpoints of steps 2 and 4."""
    return whole_and_killed(shared_directory, "lora")


def goes_on(folder: RunFolder, whole: RunFolder) -> None:
    """Resume the run, and check that it ends like the uninterrupted one."""
    ended = train(folder, *LORA)
    assert ended.returncode == 0, ended.log[-3000:]
    assert folder.status().state == "COMPLETED"
    assert measured(folder) == measured(whole)


def test_killed_between_steps(runs: tuple[RunFolder, RunFolder], row: Row) -> None:
    """Check the checkpoints of the killed run; tests/runs/test_resume.py resumes it."""
    assert [checkpoint.step for checkpoint in complete_checkpoints(runs[1].checkpoints)] == [4, 2]
    row("kill -9 between two steps", "resumes from the newest checkpoint", NOTHING)


class Canary:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def flip_a_bit(weights: Path) -> None:
    path = weights / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def run_code(weights: Path, name: str) -> None:
    (weights / name).write_bytes(pickle.dumps(Canary(weights.parents[2] / "canary")))


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit flipped in a shard": (flip_a_bit, "weights/__0_0.distcp does not match its checksum (sha256 "),
    "a shard cut short": (lambda weights: os.truncate(weights / "__0_0.distcp", 9), "weights/__0_0.distcp has 9 "),
    "a shard missing": (lambda weights: (weights / "__0_1.distcp").unlink(), "weights/__0_1.distcp is missing"),
    "`.metadata` missing": (lambda weights: (weights / ".metadata").unlink(), "weights/.metadata is missing"),
    "a `.metadata` that runs code": (lambda weights: run_code(weights, ".metadata"), "weights/.metadata has "),
    "a `common.pt` that runs code": (lambda weights: run_code(weights, "common.pt"), "weights/common.pt has "),
    "a file added to a checkpoint": (lambda weights: run_code(weights, "more.pt"), "weights/more.pt is not listed"),
    "a checkpoint without its manifest": (
        lambda weights: (weights.parent / "manifest.json").unlink(),
        "manifest.json cannot be read (FileNotFoundError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_the_latest_checkpoint_is_corrupted(
    fault: str, runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row
) -> None:
    spoil, reason = SPOILT[fault]
    folder = copy_of(runs[1], tmp_path / "run")
    spoil(folder.checkpoints / "step=4/weights")
    resumption = start(folder, *LORA)
    assert resumption.checkpoint is not None
    assert resumption.checkpoint.step == 2
    assert resumption.notes[0].startswith(f"checkpoints/step=4: {reason}")
    assert resumption.notes[0].endswith("; renamed to checkpoints/damaged-step=4")
    assert not (folder.directory / "canary").exists()
    if fault in ("a bit flipped in a shard", "a `.metadata` that runs code"):  # the other cases resume alike
        goes_on(folder, runs[0])
        assert not (folder.directory / "canary").exists()
    row(
        fault,
        "detected before loading; resumes from the checkpoint before",
        "nothing: the later steps are trained again",
    )


def test_all_checkpoints_are_corrupted(runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    folder = copy_of(runs[1], tmp_path / "run")
    for step in (2, 4):
        flip_a_bit(folder.checkpoints / f"step={step}/weights")
    before = sorted(folder.checkpoints.rglob("*"))
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid \(step=4: .*; step=2: .*\); restore its files"):
        start(folder, *LORA)
    assert sorted(folder.checkpoints.rglob("*")) == before
    row(
        "every checkpoint corrupted",
        "refused with exit code 2, which names each file; nothing is changed",
        "the corrupted files",
    )


def test_only_an_unfinished_checkpoint_is_left(runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    folder = copy_of(runs[1], tmp_path / "run")
    shutil.rmtree(folder.checkpoints / "step=2")
    (folder.checkpoints / "step=4").rename(folder.checkpoints / f"{PARTIAL}step=4")
    resumption = start(folder, *LORA)
    assert resumption.notes == ["no checkpoint was saved before this run was interrupted: starting from the beginning"]
    assert list(folder.checkpoints.iterdir()) == []
    goes_on(folder, runs[0])
    row("only an unfinished checkpoint left", "it is removed, and the run starts from step 0", NOTHING)


@dataclass(frozen=True, slots=True)
class CopyAtEachMoment:
    """A copier of the checkpoints' folder before each change to a file of it while a step is saved.

    Each copy is what a process leaves behind that is killed at that moment.
    """

    place: Path

    def __call__(self, folder: RunFolder) -> None:
        watch_files(folder.checkpoints, lambda count: self.copy(folder.checkpoints))

    def copy(self, checkpoints: Path) -> None:
        """Name the copy by the time, as the writer processes that Megatron forks make copies too."""
        if (checkpoints / "step=2").is_dir():
            shutil.copytree(checkpoints, self.place / f"{time.time_ns()}-{os.getpid()}")


@dataclass(frozen=True, slots=True)
class DieAtMoment:
    moment: int

    def __call__(self, folder: RunFolder) -> None:
        watch_files(folder.checkpoints, self.die)

    def die(self, count: int) -> None:
        if count == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_while_it_saves(runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    folder = copy_of(runs[1], tmp_path / "run")
    shutil.rmtree(folder.checkpoints / "step=4")
    moments = tmp_path / "moments"
    moments.mkdir()
    ended = train(folder, *LORA, "task.max_steps=6", fault=CopyAtEachMoment(moments))
    assert ended.returncode == 0, ended.log[-2000:]
    found = []
    for copied in sorted(moments.iterdir()):
        newest, damaged = latest_valid_checkpoint(copied)
        assert newest is not None
        assert damaged == []
        found.append(newest.step)
    assert len(found) > 20
    assert sorted(found) == found
    assert set(found) == {2, 4}  # the last change makes it step 6
    assert complete_checkpoints(folder.checkpoints)[0].step == 6
    killed = copy_of(runs[1], tmp_path / "killed")
    assert train(killed, *LORA, fault=DieAtMoment(len(found) // 4)).returncode == -signal.SIGKILL
    goes_on(killed, runs[0])
    assert not list(killed.checkpoints.glob(".*"))
    row(
        "kill -9 during a save, at every change to a file",
        "the last complete checkpoint is the newest; leftovers are removed",
        NOTHING,
    )


SIGTERMS: dict[str, AtRecord | AtSave] = {
    "in training": AtRecord(3, signal.SIGTERM),
    "in validation": AtRecord(3, signal.SIGUSR1, kind="val/target/loss"),
    "in saving": AtSave(4, signal.SIGTERM),
}


@pytest.mark.parametrize("moment", SIGTERMS)
def test_asked_to_stop(moment: str, runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    folder = RunFolder(tmp_path / "run")
    fault = SIGTERMS[moment]
    assert train(folder, *LORA, fault=fault).returncode == 75
    status = folder.status()
    stopped_at = fault.step + (moment == "in saving")  # the step has ended by then
    assert (status.state, status.reason, status.step) == ("PREEMPTED", "stopped on request", stopped_at)
    assert complete_checkpoints(folder.checkpoints)[0].step == stopped_at
    assert folder.adapter.is_dir()
    if moment == "in saving":  # the other cases resume alike
        goes_on(folder, runs[0])
    row(
        f"a signal to stop {moment}",
        "saves after the step, PREEMPTED, exit code 75",
        "nothing: every step is saved",
    )


def test_out_of_time(tmp_path: Path, row: Row) -> None:
    folder = RunFolder(tmp_path / "run")
    assert train(folder, *LORA, "task.max_time=00:00:01", fault=AtRecord(2, None, sleep=1.5)).returncode == 75
    assert (folder.status().state, folder.status().reason) == ("PREEMPTED", "task.max_time is up")
    (newest, *_) = complete_checkpoints(folder.checkpoints)
    assert newest.step == folder.status().step < 6
    row("task.max_time is up", "saves after the step, PREEMPTED, exit code 75", "nothing")


def test_a_nan_loss(runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    folder = copy_of(runs[1], tmp_path / "run")
    assert train(folder, *LORA, "lr=1e30", "resume.allow_changes=[lr]").returncode == 1
    assert folder.status().state == "FAILED"
    assert str(folder.status().reason).startswith("FloatingPointError: ")
    assert "lower lr" in str(folder.status().reason)
    assert [checkpoint.step for checkpoint in complete_checkpoints(folder.checkpoints)] == [4, 2]
    for step in (2, 4):
        verify(folder.checkpoints / f"step={step}")
    row(
        "a NaN or infinite loss or gradient",
        "FAILED, with advice on what to lower; no checkpoint of it is saved",
        "the steps since the last checkpoint",
    )


@dataclass(frozen=True, slots=True)
class ClockGoesBackwards:
    def __call__(self, folder: RunFolder) -> None:
        stock, calls = time.time, iter(range(10**9))
        time.time = lambda: stock() - 100.0 * next(calls)


def test_a_clock_that_goes_backwards(runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    folder = copy_of(runs[1], tmp_path / "run")
    ended = train(folder, *LORA, fault=ClockGoesBackwards())
    assert ended.returncode == 0, ended.log[-2000:]
    assert measured(folder) == measured(runs[0])
    assert all(record > 0 for record in rates(folder))
    row(
        "the clock goes backwards",
        "nothing: durations use the monotonic clock, checkpoints are ordered by step",
        NOTHING,
    )


@contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """Mount a small file system in memory."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs to mount a file system, which this user may not: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    """Test a disk without enough space, and one that another process fills while the checkpoint is written."""
    disk = tmp_path / "disk"
    with mounted(disk, "size=60m"):
        folder = copy_of(runs[1], disk / "run")
        filling = disk / "filling"
        filling.write_bytes(bytes(shutil.disk_usage(disk).free - 4_000_000))
        assert train(folder, *LORA).returncode == 1
        assert folder.status().state == "FAILED"
        assert "no room for a checkpoint in" in str(folder.status().reason)
        assert "a checkpoint takes" in str(folder.status().reason)
        checks(folder)
        filling.unlink()
        ended = train(folder, *LORA, fault=FillDisk(filling))
        assert ended.returncode == 1
        assert "the disk is full" in str(folder.status().reason), folder.status().reason
        checks(folder)
        filling.unlink()
        goes_on(folder, runs[0])
    row(
        "a full disk, before or while a checkpoint is written",
        "FAILED, with the space that is needed; no incomplete checkpoint",
        NOTHING,
    )


def checks(folder: RunFolder) -> None:
    assert "Earlier checkpoints are intact; free disk space" in str(folder.status().reason)
    assert [checkpoint.step for checkpoint in complete_checkpoints(folder.checkpoints)] == [4, 2]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step=2", "step=4"]


@dataclass(frozen=True, slots=True)
class FillDisk:
    filling: Path

    def __call__(self, folder: RunFolder) -> None:
        watch_files(folder.checkpoints / f"{PARTIAL}step=6" / "weights", self.fill)

    def fill(self, count: int) -> None:
        if not self.filling.exists():
            self.filling.write_bytes(bytes(shutil.disk_usage(self.filling.parent).free - 1_000_000))


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, row: Row) -> None:
    place = tmp_path / "place"
    with mounted(place, "ro"):
        command = [sys.executable, "launch.py", f"hydra.run.dir={place}/run", "experiment=smoke"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    reason = "cannot be created: Read-only file system; choose another folder"
    assert done.stderr == f"hydra.run.dir ({place}/run) {reason}\n"
    row("an output folder that is read-only", "refused with exit code 2", "nothing")
