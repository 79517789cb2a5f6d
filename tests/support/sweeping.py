"""Sweeps of the bundled demo model on a few rows: half a minute per trial, mostly for importing NeMo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from qwen_cl.runs.folder import RunFolder
from qwen_cl.sweep.processes import processes_of
from tests.conftest import ROOT
from tests.support.warm import warm_environment


def write_data(directory: Path) -> list[str]:
    """Return the overrides of a run that is fast once NeMo is imported."""
    directory.mkdir()
    for name, numbers in (("train", range(8)), ("validation", range(100, 102))):
        rows = [{"prompt": f"Say {number}.", "completion": f"The number is {number}."} for number in numbers]
        (directory / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (directory / "old.jsonl").write_text('{"text": "An old text that was known before."}\n')
    return [
        "experiment=smoke",
        "data=jsonl",
        f"data.path={directory}/train.jsonl",
        f"data.validation_path={directory}/validation.jsonl",
        "retention=files",
        f"retention.eval_sets={{old: {directory}/old.jsonl}}",
        "task.max_steps=2",
        "task.sequence_length=64",
        "task.packing=false",
        "task.global_batch_size=2",
        "model.verify=none",
        "wandb.mode=disabled",
        "cluster.accelerator=cpu",
        "peft.rank=4",
    ]


def start_sweep(directory: Path, *arguments: str, warm: bool = False) -> subprocess.Popen[str]:
    """Start a sweep; with ``warm``, its trials fork from a process that has imported NeMo (tests.support.warm)."""
    environment = warm_environment(os.environ) if warm else dict(os.environ)
    command = [sys.executable, str(ROOT / "launch.py"), "-m", f"hydra.sweep.dir={directory}", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def sweep(directory: Path, *arguments: str, warm: bool = False) -> tuple[int, str, str]:
    """Run a sweep to its end; return the exit code, stdout and stderr."""
    process = start_sweep(directory, *arguments, warm=warm)
    stdout, stderr = process.communicate(timeout=600)
    return process.returncode, stdout, stderr


def trial_folders(directory: Path) -> dict[str, RunFolder]:
    """Return the trial folders by trial number."""
    folders = sorted(path.parent for path in directory.glob("*/trial.json"))
    return {path.name[:2]: RunFolder(path) for path in folders if "cut-off" not in path.name}


def states(directory: Path) -> dict[str, str]:
    return {number: str(folder.status().state or "none") for number, folder in trial_folders(directory).items()}


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


def left_running(directory: Path) -> list[str]:
    """Return the command lines of all processes of a sweep's trials."""
    lines = []
    for folder in trial_folders(directory).values():
        for process in processes_of(folder.directory):
            with suppress(psutil.Error):  # it has ended
                lines.append(" ".join(process.cmdline()))
    return lines
