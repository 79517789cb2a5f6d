"""A run that was cut off goes on as if it had not been, whatever was trained; and only the same run does."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from qwen_cl.config.errors import UserError
from qwen_cl.runs.folder import RunFolder
from tests.conftest import ROOT
from tests.support.fault_table import Row
from tests.support.interrupted_runs import (
    STEPS,
    copy_of,
    losses,
    measured,
    overrides_of,
    start,
    train,
    watch_files,
    whole_and_killed,
    worker,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

BASE = ROOT / "qwen_cl/demo/model"
LORA = overrides_of("lora")


@pytest.fixture(scope="module")
def lora(shared_directory: Path) -> tuple[RunFolder, RunFolder]:
    return whole_and_killed(shared_directory, "lora")


@pytest.mark.parametrize("method", ["lora", "none"])
def test_a_killed_run_loses_nothing(method: str, shared_directory: Path, tmp_path: Path) -> None:
    whole, killed = whole_and_killed(shared_directory, method)
    assert list(losses(whole)) == [1, 2, 3, 4, 5, 6]
    assert list(losses(killed)) == [1, 2, 3, 4]
    assert abs(losses(whole)[4] - losses(whole)[1]) > 1, "training changed nothing, so this test shows nothing"
    assert killed.status().state == "RUNNING"  # nobody was left to say otherwise
    resumed = copy_of(killed, tmp_path / "resumed")
    assert train(resumed, *overrides_of(method)).returncode == 0
    status = resumed.status()
    assert (status.state, status.step) == ("COMPLETED", STEPS)
    assert [(cut["step"], cut["state"]) for cut in status.resumed] == [(4, "RUNNING")]
    assert measured(resumed) == measured(whole)  # to the last bit
    assert sorted(path.name for path in resumed.checkpoints.iterdir()) == ["step=2", "step=4", "step=6"]
    if method != "none":
        ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (resumed, whole))
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in ours)
    weights = resumed.checkpoints / "step=6/weights"
    assert json.loads((weights / "base_model.json").read_text())["source"] == str(BASE)
    if method != "none":
        assert json.loads((weights / "adapter_metadata.json").read_text()) == {"model_ckpt_path": str(BASE)}


def kill_at_adapter(folder: RunFolder) -> None:
    """When the last checkpoint is saved and the adapter is not."""
    watch_files(folder.directory / ".adapter-", lambda count: os.kill(os.getpid(), signal.SIGKILL))


def test_killed_after_its_last_step_it_is_brought_to_its_end(lora: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    whole, killed = lora
    folder = copy_of(killed, tmp_path / "run")
    saved = "task.async_save=false"
    assert train(folder, *LORA, saved, fault=kill_at_adapter).returncode == -signal.SIGKILL
    assert (folder.checkpoints / "step=6").is_dir()
    assert not folder.adapter.exists()
    assert train(folder, *LORA).returncode == 0
    assert folder.status().state == "COMPLETED"
    assert measured(folder) == measured(whole)
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (folder, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    samples = [json.loads(line)["step"] for line in folder.samples.read_text().splitlines()]
    assert samples == [0, 6]


def test_a_finished_run_goes_further_only_if_that_is_said(lora: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    folder = copy_of(lora[0], tmp_path / "run")
    longer = [*LORA, "task.max_steps=8"]
    before = (folder.status_file.read_bytes(), folder.metrics_file.read_bytes())
    with pytest.raises(UserError, match=r"holds a run already \(COMPLETED\); choose another folder, or remove it"):
        start(folder, *longer)
    assert (folder.status_file.read_bytes(), folder.metrics_file.read_bytes()) == before
    assert train(folder, *longer, "resume.allow_changes=[task.max_steps]").returncode == 0
    assert list(losses(folder)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {step: loss for step, loss in losses(folder).items() if step <= STEPS} == losses(lora[0])
    # By the longer schedule: a cosine from 1 step of warm-up to a tenth at step 8.
    for step in (7, 8):
        expected = 0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 7)) / 2)
        assert measured(folder)[f"{step} optim/lr"] == pytest.approx(expected)
    with pytest.raises(UserError, match=r"holds a run already \(COMPLETED\)"):
        start(folder, *longer)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (["lr=0.02"], "lr was 0.01 and is 0.02."),
        (["seed=1", "lr=0.02"], "lr was 0.01 and is 0.02; seed was 1234 and is 1."),
        (["task.global_batch_size=2"], "task.global_batch_size was 4 and is 2."),
        (["cluster.precision=bf16"], "cluster.precision was fp32 and is bf16."),
        (["task.max_steps=8"], "task.max_steps was 6 and is 8."),
        (["peft.rank=4"], "peft.rank was 32 and is 4."),
        (["retention=none"], "data.hash was "),
    ],
)
def test_another_run_is_refused_and_nothing_is_changed(
    said: list[str], shown: str, lora: tuple[RunFolder, RunFolder], row: Row
) -> None:
    killed = lora[1]
    before = {path: path.stat().st_mtime_ns for path in killed.directory.rglob("*") if not path.name.endswith(".lock")}
    with pytest.raises(UserError) as refused:
        start(killed, *LORA, *said)
    message = str(refused.value)
    assert message.startswith(
        f"hydra.run.dir ({killed.directory}) holds a run that was started with other values: {shown}"
    )
    assert ("resume.allow_changes=[" in message) == (said != ["peft.rank=4"])
    after = {path: path.stat().st_mtime_ns for path in killed.directory.rglob("*") if not path.name.endswith(".lock")}
    assert after == before
    row(
        "another config, or other data, in a run's folder", "refused with exit code 2, each difference shown", "nothing"
    )


def test_a_model_that_moved_is_refused(lora: tuple[RunFolder, RunFolder], tmp_path: Path, row: Row) -> None:
    """A branch resolves to another commit now; a directory has other weights."""
    folder = copy_of(lora[1], tmp_path / "run")
    config: dict[str, Any] = yaml.safe_load(folder.config.read_text())
    config["model"]["source"] = f"hf://org/tiny@{'a' * 40}"
    folder.config.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"model.source was hf://org/tiny@{'a' * 40} and is {BASE}\\. Restore"):
        start(folder, *LORA, "resume.allow_changes=[model]")
    row("another commit of the model", "refused with exit code 2: its checkpoints are incompatible", "nothing")
    changed = copy_of(lora[1], tmp_path / "changed")
    changed.update_status(model_fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"model\.fingerprint was 0000"):
        start(changed, *LORA, "resume.allow_changes=[model]")


def test_what_may_differ_and_what_is_allowed_to(lora: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    folder = copy_of(lora[1], tmp_path / "run")
    with pytest.raises(
        UserError, match=re.escape("resume.allow_changes (learning_rate) is not a config key; write it in full")
    ):
        start(folder, *LORA, "lr=0.02", "resume.allow_changes=[learning_rate]")
    with pytest.raises(UserError, match="seed was 1234 and is 1"):
        start(folder, *LORA, "lr=0.02", "seed=1", "resume.allow_changes=[lr]")
    other = ["task.micro_batch_size=1", "task.log_interval=2", "task.keep_best=1", "name=other"]
    resumption = start(folder, *LORA, *other, "lr=0.02", "resume.allow_changes=[lr]")
    assert resumption.checkpoint is not None
    assert resumption.notes == ["resuming from checkpoints/step=4 (checksums verified)"]
    assert yaml.safe_load(folder.config.read_text())["lr"] == 0.02


def test_never_refuses_an_interrupted_run(lora: tuple[RunFolder, RunFolder]) -> None:
    with pytest.raises(UserError, match=r"holds a run already \(RUNNING\); choose another folder, or remove it first"):
        start(lora[1], *LORA, "resume=never")


def test_the_worker_itself_refuses_another_base(lora: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    folder = copy_of(lora[1], tmp_path / "run")
    start(folder, *LORA)
    config: dict[str, Any] = yaml.safe_load(folder.config.read_text())
    other = shutil.copytree(config["model"]["source"], tmp_path / "other")
    config["model"]["source"] = str(other)
    folder.config.write_text(yaml.safe_dump(config))
    assert run_ranks(worker, folder.directory, None).returncode == 1
    assert folder.status().state == "FAILED"
    assert f"was trained on {BASE}, and the recipe restores {other}" in str(folder.status().reason)


def test_a_batch_script_makes_the_same_choice(lora: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    folder = copy_of(lora[1], tmp_path / "run")
    (folder.checkpoints / "step=4/weights/common.pt").write_bytes(b"other")

    def choose() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qwen_cl.runs.resume", str(folder.directory)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = choose()
    assert done.returncode == 0, done.stderr
    assert "checkpoints/step=4: weights/common.pt has 5 bytes of" in done.stdout
    assert folder.status().resume_from == str(folder.checkpoints / "step=2")
    assert list(losses(folder)) == [1, 2]
    (folder.checkpoints / "step=2/weights/common.pt").unlink()
    done = choose()
    assert done.returncode == 2
    assert "no checkpoint in" in done.stderr
    assert "step=2: weights/common.pt is missing" in done.stderr
    assert folder.status().state == "FAILED"
