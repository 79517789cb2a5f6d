"""A run folder stays consistent for its readers, and is locked against other runs, during a run and after a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.runs.folder import RunFolder, remove_if_empty
from qwen_cl.runs.status import RunStatus, State

ROOT = Path(__file__).resolve().parents[2]

# Reads until told to stop; a status that is half old and half new fails as one that does not parse.
READER = """
import json, pathlib, sys
status, stop = map(pathlib.Path, sys.argv[1:])
print("ready", flush=True)
steps = []
while not stop.exists():
    with open(status, encoding="utf-8") as stream:
        found = json.load(stream)
    assert found["reason"] == str(found["step"] % 10) * 100_000, found["step"]
    steps.append(found["step"])
assert steps == sorted(steps)
print(len(set(steps)))
"""

HOLDER = """
import sys
from qwen_cl.runs.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def child(code: str, *arguments: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has said its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() in ("ready\n", "held\n")
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_reader_never_sees_half_a_status(tmp_path: Path) -> None:
    folder, stop = RunFolder(tmp_path), tmp_path / "stop"
    folder.update_status(step=0, reason="0" * 100_000)
    with child(READER, folder.status_file, stop) as reader:
        for step in range(1, 300):
            folder.update_status(step=step, reason=str(step % 10) * 100_000)
        stop.touch()
        output, errors = reader.communicate()
        assert reader.returncode == 0, errors
    assert int(output) > 10, "the reader saw too few updates to show anything"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".status.lock", "status.json", "stop"]


def test_updates_add_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.status() == RunStatus()
    folder.update_status(state=State.RUNNING, phase="起動")
    folder.update_status(step=3, phase="training")
    folder.update_status(phase="training: 1 of 2")
    expected = {"state": "RUNNING", "phase": "training: 1 of 2", "step": 3}
    status = folder.status()
    assert (status.state, status.phase, status.step) == (State.RUNNING, "training: 1 of 2", 3)
    began = status.phase_started_at
    assert list(began) == ["起動", "training"]
    assert began["起動"] <= began["training"]
    assert json.loads(folder.status_file.read_text(encoding="utf-8")) == {**expected, "phase_started_at": began}


def test_an_update_that_fails_leaves_the_status_before_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.update_status(step=1)
    with pytest.raises(TypeError):
        folder.update_status(step=2, device=object())
    with pytest.raises(TypeError, match=r"status\.json has no field steps"):
        folder.update_status(steps=2)
    assert folder.status() == RunStatus(step=1)


def test_a_folder_in_use_is_refused_until_its_holder_dies(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with child(HOLDER, tmp_path) as holder:
        with pytest.raises(UserError) as refused, folder.lock():
            pytest.fail("two processes hold the folder")
        message = f"hydra.run.dir ({tmp_path}) is in use by another run; choose another folder, or wait for it"
        assert str(refused.value) == message
        assert holder.poll() is None
        holder.kill()  # SIGKILL: no handler of the holder's runs
        holder.wait()
        with folder.lock(), pytest.raises(UserError, match="in use by another run"), RunFolder(tmp_path).lock():
            pytest.fail("one process holds the folder twice")
    with folder.lock():
        pass


def test_a_folder_is_in_use_for_as_long_as_a_worker_writes_to_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.worker_lock(), pytest.raises(UserError) as refused, RunFolder(tmp_path).lock():
        pytest.fail("a launcher would start a second worker")
    assert str(refused.value) == (
        f"hydra.run.dir ({tmp_path}) is still written to by a run whose launcher is gone; choose another folder, or "
        "wait for it"
    )
    with folder.lock(), RunFolder(tmp_path).worker_lock():  # the launcher holds the first, its worker the second
        pass


def test_metrics_are_lines_one_for_each_record(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records: list[dict[str, Any]] = [
        {"step": 0, "val/target/loss": 7.5},
        {"step": 1, "train/loss": 0.1 + 0.2, "note": "損失\n高い"},
    ]
    for number, record in enumerate(records, start=1):
        folder.append_metrics(record)
        text = folder.metrics_file.read_text(encoding="utf-8")
        assert text.endswith("\n")
        assert [json.loads(line) for line in text.splitlines()] == records[:number]


def test_a_refused_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "outputs/finetune-lora/now"
    directory.mkdir(parents=True)
    with RunFolder(directory).lock():
        pass
    remove_if_empty(directory)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for other in ("outputs/now/run.log", "elsewhere/before/run.log"):
        path = tmp_path / other
        path.parent.mkdir(parents=True)
        path.touch()
        (path.parent / ".lock").touch()
        remove_if_empty(path.parent)
        assert sorted(path.name for path in path.parent.iterdir()) == [".lock", "run.log"]
    (tmp_path / "elsewhere/now").mkdir()
    remove_if_empty(tmp_path / "elsewhere/now")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["before"]


def test_folders_outside_the_working_directory_are_not_ours_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "mine/now").mkdir(parents=True)
    remove_if_empty(tmp_path / "mine/now")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "mine"]
