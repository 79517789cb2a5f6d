"""Training goes on while a checkpoint is written, and whatever happens meanwhile, what was saved before is whole."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen_cl.runs.checkpoints import complete_checkpoints, partial_path
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.manifest import read_manifest, verify
from tests.support.fault_table import Row
from tests.support.interrupted_runs import (
    AtRecord,
    Fault,
    losses,
    measured,
    overrides_of,
    train,
    watch_files,
    whole_and_killed,
)

pytestmark = pytest.mark.slow

LORA = overrides_of("lora")
PATIENCE = 60.0
"""Seconds that a writer waits for what does not come, where training waits for it."""


@pytest.fixture(scope="module")
def runs(shared_directory: Path) -> tuple[RunFolder, RunFolder]:
    """The same run, saved while it trained, and while it waited."""
    return whole_and_killed(shared_directory, "lora")


@dataclass(frozen=True, slots=True)
class AtWriting:
    """Holds the processes that write a step's checkpoint until the metrics have a later step, and does something."""

    step: int
    until: int
    action: Callable[[RunFolder], None] | None = None

    def __call__(self, folder: RunFolder) -> None:
        trainer = os.getpid()

        def hold(count: int) -> None:
            deadline = time.monotonic() + PATIENCE
            while self.until not in losses(folder):
                if not psutil.pid_exists(trainer):
                    os._exit(1)
                if time.monotonic() > deadline:
                    (folder.directory / "nothing came").touch()
                    os._exit(1)
                time.sleep(0.01)
            if self.action is not None:
                self.action(folder)

        watch_files(partial_path(folder.checkpoints, self.step) / "weights/__", hold)


def steps(folder: RunFolder) -> list[int]:
    found = complete_checkpoints(folder.checkpoints)
    for checkpoint in found:
        verify(checkpoint.path)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == sorted(path.path.name for path in found)
    return [checkpoint.step for checkpoint in found]


def test_steps_are_trained_while_a_checkpoint_is_written(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    ended = train(folder, *LORA, fault=Both(AtWriting(2, until=4), note_copies))
    assert ended.returncode == 0, ended.log[-2000:]
    assert measured(folder) == measured(runs[0])
    assert steps(folder) == [6, 4, 2]
    copies = (folder.directory / "copies").read_text().split()
    assert copies[:4] == ["1:0", "2:0", "3:1", "4:1"]  # their memory is not reused while the writers read it
    for name in ("__0_0.distcp", "__0_1.distcp"):  # what was when the save began, not when it was written
        ours, theirs = (run.checkpoints / "step=2/weights" / name for run in (folder, runs[1]))
        assert ours.read_bytes() == theirs.read_bytes()


class Copies(list[Any]):
    """A list that weak references may point to."""


def note_copies(folder: RunFolder) -> None:
    """Note at each training step how many copies of tensors, made for writers, have not been released."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from qwen_cl.patches.async_writers import retain_staged_tensors

    made: list[weakref.ref[Copies]] = []
    stock_preload, stock_append = FileSystemWriterAsync.preload_tensors, RunFolder.append_metrics

    def preload(write_buckets: Any, non_blocking: bool = True) -> Copies:
        copies = Copies(stock_preload(write_buckets, non_blocking))
        made.append(weakref.ref(copies))
        return copies

    def append(this: RunFolder, line: dict[str, Any]) -> None:
        if "train/loss" in line:
            with (folder.directory / "copies").open("a") as stream:
                stream.write(f"{line['step']}:{sum(copies() is not None for copies in made)} ")
        stock_append(this, line)

    patched: Any = RunFolder
    patched.append_metrics = append
    FileSystemWriterAsync.preload_tensors = staticmethod(preload)
    retain_staged_tensors()  # again, over the function that counts


def test_without_it_training_waits(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    seen: Fault = AtWriting(2, until=2, action=note_newest)
    assert train(folder, *LORA, "task.async_save=false", "task.max_steps=4", fault=seen).returncode == 0
    assert set((folder.directory / "seen").read_text().split()) == {"2"}


def test_training_waits_where_memory_is_short_also_for_the_first(tmp_path: Path) -> None:
    """Check the first save, for which no earlier one tells how much memory it takes."""
    folder = RunFolder(tmp_path / "run")
    fault = Both(short_of_memory, AtWriting(2, until=2, action=note_newest))
    assert train(folder, *LORA, "task.max_steps=4", fault=fault).returncode == 0
    assert set((folder.directory / "seen").read_text().split()) == {"2"}


def short_of_memory(folder: RunFolder) -> None:
    from types import SimpleNamespace

    patched: Any = psutil
    patched.virtual_memory = lambda: SimpleNamespace(available=2**20, total=2**40)


def note_newest(folder: RunFolder) -> None:
    with (folder.directory / "seen").open("a") as stream:
        time.sleep(0.5)  # in which a step would come
        stream.write(f"{max(losses(folder))} ")


def test_killed_while_its_writers_write(runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    folder = RunFolder(tmp_path / "run")

    assert train(folder, *LORA, fault=Both(AtWriting(4, until=6), AtRecord(5, signal.SIGKILL))).returncode == -9
    assert list(losses(folder)) == [1, 2, 3, 4]
    assert [checkpoint.step for checkpoint in complete_checkpoints(folder.checkpoints)] == [2]
    ended = train(folder, *LORA)
    assert ended.returncode == 0, ended.log[-2000:]
    assert measured(folder) == measured(runs[0])
    assert steps(folder) == [6, 4, 2]
    row(
        "kill -9 while a checkpoint is written in the background",
        "resumes from the checkpoint before it",
        "nothing: losses equal those of an uninterrupted run to the last bit",
    )


@dataclass(frozen=True, slots=True)
class Both:
    first: Fault
    second: Fault

    def __call__(self, folder: RunFolder) -> None:
        self.first(folder)
        self.second(folder)


@pytest.mark.parametrize("which", ["the one", "all"])
def test_a_writer_is_killed(which: str, runs: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    folder = RunFolder(tmp_path / "run")
    action = kill_one if which == "the one" else kill_all
    assert train(folder, *LORA, fault=AtWriting(4, until=5, action=action)).returncode == 1
    reason = str(folder.status().reason)
    assert "a process that wrote the checkpoint ended unexpectedly" in reason
    assert steps(folder) == [2]
    if which == "all":  # the other would go on alike
        assert train(folder, *LORA).returncode == 0
        assert measured(folder) == measured(runs[0])
    row(
        "kill -9 of a process that writes a checkpoint",
        "FAILED, and says so; no half checkpoint",
        "the steps since the last checkpoint",
    )


def kill_one(folder: RunFolder) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_all(folder: RunFolder) -> None:
    """The one that waits for it too."""
    os.kill(os.getppid(), signal.SIGKILL)
    kill_one(folder)


def test_what_fails_later_does_not_take_a_checkpoint_along(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    ended = train(folder, *LORA, fault=Both(AtWriting(4, until=4), fail_at_five))
    assert ended.returncode == 1
    assert str(folder.status().reason).startswith("ValueError: the fifth")
    assert steps(folder) == [4, 2]


def fail_at_five(folder: RunFolder) -> None:
    stock = RunFolder.append_metrics

    def append(this: RunFolder, line: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise ValueError("the fifth")
        stock(this, line)

    patched: Any = RunFolder
    patched.append_metrics = append


def test_a_rank_that_fails_waits_for_no_writer(tmp_path: Path) -> None:
    """Others would wait for it, and its GPU."""
    folder = RunFolder(tmp_path / "run")
    fault = Both(AtWriting(2, until=99), fail_in_rank_one)
    ended = train(folder, *LORA, "cluster.devices=2", fault=fault, ranks=2)
    assert ended.returncode == 1
    assert "of cheese" in ended.log
    assert not (folder.directory / "nothing came").exists()
    assert not list(folder.checkpoints.glob("step=*"))


def fail_in_rank_one(folder: RunFolder) -> None:
    from qwen_cl.training.callbacks.metrics import RunRecorder

    stock = RunRecorder.on_train_batch_end

    def end(self: Any, trainer: Any, *args: Any) -> None:
        if os.environ["RANK"] == "1" and trainer.global_step == 3:
            raise ValueError("this rank is made of cheese")
        stock(self, trainer, *args)

    patched: Any = RunRecorder
    patched.on_train_batch_end = end


@pytest.mark.parametrize("rank", [0, 1])
def test_the_disk_of_one_rank_is_full(rank: int, tmp_path: Path, row: Row) -> None:
    folder = RunFolder(tmp_path / "run")
    ended = train(folder, *LORA, "cluster.devices=2", fault=FullDiskOf(rank), ranks=2)
    assert ended.returncode == 1
    status = folder.status()
    assert status.state == "FAILED"
    assert "no room for a checkpoint in" in str(status.reason), status.reason
    assert "the disk is full" in str(status.reason)
    assert steps(folder) == [2]
    row(
        "a full disk of one of two ranks",
        "FAILED on both, says so; no half checkpoint",
        "the steps since the last checkpoint",
    )


@dataclass(frozen=True, slots=True)
class FullDiskOf:
    """The system says so, to whom writes into /dev/full."""

    rank: int

    def __call__(self, folder: RunFolder) -> None:
        if os.environ["RANK"] != str(self.rank):
            return
        weights = partial_path(folder.checkpoints, 4) / "weights"
        name = weights / f"__{self.rank}_0.distcp"

        def link(count: int) -> None:
            if not name.is_symlink():
                name.symlink_to("/dev/full")

        watch_files(name, link)


def test_a_copy_is_not_begun_before_the_last_is_through(tmp_path: Path) -> None:
    """Save every step: each save waits for the previous one, and none is skipped."""
    folder = RunFolder(tmp_path / "run")
    assert train(folder, *LORA, "task.checkpoint_interval=1", "task.keep_last=10").returncode == 0
    assert steps(folder) == [6, 5, 4, 3, 2, 1]
    manifests = {step: read_manifest(folder.checkpoints / f"step={step}") for step in range(1, 7)}
    measures = {key: value for key, value in measured(folder).items() if key.endswith(" val/target/loss")}
    assert measures.keys() == {f"{step} val/target/loss" for step in (0, 3, 6)}
    for step, manifest in manifests.items():
        assert manifest.val_loss == measures.get(f"{step} val/target/loss")
