"""Runs of the bundled demo model that are interrupted at a chosen moment by real signals, and resumed.

The processes are those of ``qwen_cl.training.worker``, forked from one that has imported NeMo
(``tests.support.ranks``). A fault is a function of this module or of a test that runs first in the process and waits
for its moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_cl.config.run import RunConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.planning.plan import Plan, make_plan
from qwen_cl.runs.checkpoints import partial_path
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.resume import Resumption
from qwen_cl.training.prepare import initialize_run_folder
from tests.conftest import FEW, ROOT
from tests.support.ranks import Ended, run_ranks

STEPS = 6
SHORT = [
    "cluster.accelerator=cpu",
    "wandb.mode=disabled",
    FEW,
    "model.verify=none",
    "lr=0.01",
    f"task.max_steps={STEPS}",
    "task.checkpoint_interval=2",
    "task.keep_last=3",
    "task.val_check_interval=3",
    "task.global_batch_size=4",
    "task.sequence_length=64",
    "task.warmup_steps=1",
    "task.sample_prompts=1",
    "task.sample_tokens=2",
]
Fault = Callable[[RunFolder], None]


def plan(*overrides: str) -> Plan:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return make_plan(cast(RunConfig, OmegaConf.to_object(compose("config", [*SHORT, *overrides]))))


def start(folder: RunFolder, *overrides: str) -> Resumption:
    """Do what the launcher does before a run's processes start; raise its errors."""
    folder.directory.mkdir(parents=True, exist_ok=True)
    with folder.lock():
        return initialize_run_folder(plan(*overrides), folder)


def train(folder: RunFolder, *overrides: str, fault: Fault | None = None, ranks: int = 1) -> Ended:
    start(folder, *overrides)
    return run_ranks(worker, folder.directory, fault, ranks=ranks)


def worker(directory: Path, fault: Fault | None) -> int:
    from qwen_cl.training.worker import main

    if fault is not None:
        fault(RunFolder(directory))
    return main(str(directory))


def overrides_of(method: str) -> list[str]:
    """Return the settings with dropout if possible, as random numbers must be the same after a resume."""
    return [f"peft={method}", *([] if method == "none" else ["peft.dropout=0.1"])]


def whole_and_killed(shared: Path, method: str) -> tuple[RunFolder, RunFolder]:
    """Return an uninterrupted run, and the same run killed in its fifth step with checkpoints of steps 2 and 4; made
    once per session."""
    directory = shared / f"cut-off-{method}"
    whole, killed = RunFolder(directory / "whole"), RunFolder(directory / "killed")
    with FileLock(shared / f"cut-off-{method}.lock"):
        if not directory.exists():
            assert train(whole, *overrides_of(method)).returncode == 0
            waiting = [*overrides_of(method), "task.async_save=false"]
            ended = train(killed, *waiting, fault=AtRecord(5, signal.SIGKILL))
            assert ended.returncode == -signal.SIGKILL, ended.log[-2000:]
    return whole, killed


def losses(folder: RunFolder) -> dict[int, float]:
    """Return the training loss by step; each step must occur once."""
    records = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    trained = [record for record in records if "train/loss" in record]
    found = {record["step"]: record["train/loss"] for record in trained}
    assert len(found) == len(trained), "a step was recorded twice"
    return found


def measured(folder: RunFolder) -> dict[str, Any]:
    """Return the metrics that must not depend on an interruption: all of metrics.jsonl but times and memory."""
    kept: dict[str, Any] = {}
    for line in folder.metrics_file.read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in ("time", "step", "memory/peak_gib") and not name.startswith("throughput/"):
                key = f"{record['step']} {name}"
                assert key not in kept, f"{key} was recorded twice"
                kept[key] = value
    return kept


def copy_of(folder: RunFolder, directory: Path) -> RunFolder:
    shutil.copytree(folder.directory, directory)
    return RunFolder(directory)


@dataclass(frozen=True, slots=True)
class AtRecord:
    """The callback that sends the process a signal, or lets it sleep, just before it records a step."""

    step: int
    number: signal.Signals | None
    kind: str = "train/loss"
    """The field that selects the record: of training or of validation."""
    sleep: float = 0.0
    """Seconds to sleep."""

    def __call__(self, folder: RunFolder) -> None:
        stock = RunFolder.append_metrics

        def append(this: RunFolder, line: dict[str, Any]) -> None:
            if line["step"] == self.step and self.kind in line:
                time.sleep(self.sleep)
                if self.number is not None:
                    os.kill(os.getpid(), self.number)
            stock(this, line)

        patched: Any = RunFolder
        patched.append_metrics = append


@dataclass(frozen=True, slots=True)
class AtSave:
    """The callback that sends the process a signal before the first file of a step's checkpoint is written."""

    step: int
    number: signal.Signals

    def __call__(self, folder: RunFolder) -> None:
        watch_files(partial_path(folder.checkpoints, self.step), self.send)

    def send(self, count: int) -> None:
        if count == 1:
            os.kill(os.getpid(), self.number)


def rates(folder: RunFolder) -> list[float]:
    """Return the tokens per second of each step."""
    records = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return [record["throughput/tokens_per_second"] for record in records if "train/loss" in record]


def watch_files(place: Path, action: Callable[[int], None]) -> None:
    """Call ``action`` with a count before each change to a file or folder whose path begins with ``place``."""
    count = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        if event == "open" and not _writes(arguments):
            return
        if str(arguments[0]).startswith(str(place)):
            count += 1
            action(count)

    sys.addaudithook(audit)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return any(letter in str(mode or "") for letter in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
