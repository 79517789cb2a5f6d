"""`python launch.py -m` with real trials: killed, resumed, stopped."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from qwen_cl.config.peft import LoraConfig
from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.sweep.processes import processes_of
from tests.support.sweeping import left_running, start_sweep, states, sweep, trial_folders, wait_until, write_data

pytestmark = pytest.mark.slow

# A learning rate of 1e30 with a scale of 1e-30 changes nothing; with a scale of 8 the gradient overflows.
GRID = ["lr=1e30,1e-3", "peft.alpha=1e-30,2e-30,8", "hydra.launcher.cpu_slots=2"]
VALUES = {
    "00": (1e30, 1e-30),
    "01": (1e30, 2e-30),
    "02": (1e30, 8),
    "03": (1e-3, 1e-30),
    "04": (1e-3, 2e-30),
    "05": (1e-3, 8),
}


def test_a_killed_sweep_resumes_and_runs_nothing_twice(tmp_path: Path) -> None:
    base = write_data(tmp_path / "data")
    directory = tmp_path / "sweep"
    first = start_sweep(directory, *base, *GRID)
    wait_until(lambda: any("qwen_cl.training.worker" in line for line in left_running(directory)), first)
    killed = kill_a_worker(directory)
    refused = sweep(directory, *base, *GRID)
    assert refused[0] == 2
    assert f"hydra.sweep.dir ({directory}) is in use by another sweep" in refused[2]
    wait_until(lambda: list(states(directory).values()).count("COMPLETED") == 2, first)
    wait_until(lambda: any("qwen_cl.training.worker" in line for line in left_running(directory)), first)
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 120
    while left_running(directory):
        assert time.monotonic() < deadline, left_running(directory)
        time.sleep(0.2)
    # Running trials got a signal to stop and were not killed; the state of 02 depends on its progress.
    assert {state for number, state in states(directory).items() if number != "02"} <= {
        "COMPLETED",
        "PREEMPTED",
        "none",
    }
    before = finished(directory)
    assert len(before) >= 2

    returncode, stdout, stderr = sweep(directory, *base, *GRID, warm=True)
    assert returncode == 1, stderr
    assert "FAILED: 5 COMPLETED, 1 FAILED" in stderr, stderr
    assert left_running(directory) == []
    assert {name: finished(directory)[name] for name in before} == before
    assert states(directory) == {number: "FAILED" if number == "02" else "COMPLETED" for number in VALUES}
    assert f"{len(before)} already completed" in stdout
    check_results(directory, stdout)
    # The killed trial, and those that the killed sweep interrupted, were started twice.
    attempts = {number: record_of(directory, number)["attempts"] for number in VALUES}
    gone_on = {number: folder.status().resumed for number, folder in trial_folders(directory).items()}
    # One more if a trial's launcher was killed before its run had a folder.
    assert all(1 + len(gone_on[number]) <= attempts[number] <= 2 + len(gone_on[number]) for number in VALUES)
    assert [cut["state"] for cut in gone_on[killed]] == ["FAILED"]
    assert {number for number in before if attempts[number] > 1} <= {killed}


def kill_a_worker(directory: Path) -> str:
    """Kill the worker of the first trial that has one; return the trial's number."""
    for number, folder in trial_folders(directory).items():
        for process in processes_of(folder.directory):
            if "qwen_cl.training.worker" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                return number
    raise AssertionError("no worker")


def finished(directory: Path) -> dict[str, tuple[bytes, bytes]]:
    """Return the files that must not change any more, by trial."""
    return {
        number: (folder.status_file.read_bytes(), folder.metrics_file.read_bytes())
        for number, folder in trial_folders(directory).items()
        if folder.status().state == "COMPLETED"
    }


def record_of(directory: Path, number: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((trial_folders(directory)[number].directory / "trial.json").read_text())
    return record


def check_results(directory: Path, stdout: str) -> None:
    """Check the results against the trials' own files."""
    register_schemas()
    summary = json.loads((directory / "sweep.json").read_text())
    results = {f"{result['number']:02}": result for result in summary["results"]}
    losses = {}
    for number, folder in trial_folders(directory).items():
        config = load_config(folder.config)
        assert isinstance(config.peft, LoraConfig)
        assert (config.lr, config.peft.alpha) == VALUES[number]
        records = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
        if number == "02":
            assert re.match(r"FloatingPointError: training (loss|gradient norm) is nan", results[number]["reason"])
            continue
        losses[number] = [line["val/target/loss"] for line in records if "val/target/loss" in line]
        assert results[number]["val_loss"] == losses[number][-1]
        old = [line["retention/old/loss"] for line in records if "retention/old/loss" in line]
        assert results[number]["forgetting"] == pytest.approx(old[-1] - old[0])
        assert results[number]["seconds"] > 0
    # Only one trial had a learning rate and a scale that learn.
    assert losses["05"][-1] < losses["05"][0] - 0.1
    assert losses["00"][-1] == pytest.approx(losses["00"][0], abs=1e-3)
    order = [f"{result['number']:02}" for result in summary["results"]]
    assert order[:-1] == sorted(losses, key=lambda number: losses[number][-1])
    assert order[-1] == "02"
    assert summary["best"] == trial_folders(directory)["05"].directory.name
    behind = losses[order[1]][-1] - losses["05"][-1]
    assert f"best  {summary['best']}, validation loss {losses['05'][-1]:.4f}, {behind:.4f} (" in stdout
    assert re.search(rf"^ \* +05 +COMPLETED .* {losses['05'][-1]:.4f} ", stdout, re.MULTILINE), "cut to 80 columns"
    assert len((directory / "sweep.csv").read_text().splitlines()) == 7
    for name in ("loss-curves.png", "pareto.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")


def test_the_first_failure_stops_the_others_if_asked(tmp_path: Path) -> None:
    base = write_data(tmp_path / "data")
    directory = tmp_path / "sweep"
    long = ["task.max_steps=100000", "task.val_check_interval=100000"]
    options = ["hydra.launcher.cpu_slots=2", "hydra.launcher.fail_fast=true"]
    returncode, _, stderr = sweep(directory, *base, *long, "lr=1e-5,1e30,1e-6", *options)
    assert returncode == 1
    assert "FAILED: 1 waiting, 1 FAILED, 1 PREEMPTED" in stderr
    assert states(directory) == {"00": "PREEMPTED", "01": "FAILED"}
    stopped = trial_folders(directory)["00"].status()
    assert stopped.reason == "stopped because 01-lr_1e30 failed (hydra.launcher.fail_fast)"
    assert left_running(directory) == []


def test_ctrl_c_asks_every_trial_to_stop(tmp_path: Path) -> None:
    base = write_data(tmp_path / "data")
    directory = tmp_path / "sweep"
    long = ["task.max_steps=100000", "task.val_check_interval=100000"]
    process = start_sweep(directory, *base, *long, "seed=1,2,3", "hydra.launcher.cpu_slots=2")
    wait_until(lambda: sum("qwen_cl.training.worker" in line for line in left_running(directory)) == 2, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stdout.count("Stopping: every trial saves a checkpoint first. Interrupt again to kill the trials.") == 1
    assert "PREEMPTED: 1 waiting, 2 PREEMPTED; the same command with hydra.sweep.dir=" in stderr
    assert "Traceback" not in stderr
    assert {folder.status().reason for folder in trial_folders(directory).values()} == {"stopped on request"}
    assert left_running(directory) == []


def test_a_search_stops_who_falls_behind_and_repeats_nothing(tmp_path: Path) -> None:
    base = write_data(tmp_path / "data")
    directory = tmp_path / "sweep"
    # With this seed the first two points differ, and the third repeats one of them.
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.seed=0", "peft.alpha=1e-30,8"]
    halving = ["hydra.sweeper.reduction_factor=2", "task.val_check_interval=2", "task.max_steps=120", "lr=1e-3"]
    returncode, stdout, stderr = sweep(directory, *base, *search, *halving, "hydra.launcher.cpu_slots=1", warm=True)
    assert returncode == 0, stderr
    assert states(directory) == {"00": "COMPLETED", "01": "PREEMPTED"}
    pruned = trial_folders(directory)["01"].status()
    assert str(pruned.reason).startswith("pruned: its validation loss at step ")
    assert pruned.step < 120
    storage = JournalStorage(JournalFileBackend(str(directory / "study.journal")))
    found = optuna.load_study(study_name="sweep", storage=storage).trials
    assert [(trial.params["peft.alpha"], trial.state.name) for trial in found] == [
        ("8", "COMPLETE"),
        ("1e-30", "PRUNED"),
        ("8", "COMPLETE"),
    ]
    records = [json.loads(line) for line in trial_folders(directory)["00"].metrics_file.read_text().splitlines()]
    assert (
        found[0].value
        == found[2].value
        == [line["val/target/loss"] for line in records if "val/target/loss" in line][-1]
    )
    assert "best  00-alpha_8, validation loss" in stdout
