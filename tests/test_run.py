"""The main command end to end: its output, its files, and how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.runs.folder import RunFolder
from tests.conftest import ROOT, Launched, launch
from tests.support.fault_table import Row


@pytest.mark.gpu
def test_main_command_learns_and_says_where_everything_is(trained: Launched) -> None:
    assert trained.returncode == 0, trained.stderr
    status = trained.folder.status()
    assert status.state == "COMPLETED"
    assert status.step == 40
    assert status.reason is None
    assert status.seconds is not None
    assert status.seconds >= 0
    assert list(status.phase_started_at) == [
        "starting",
        "importing NeMo",
        "starting W&B",
        "loading the model",
        "training",
    ]
    assert status.versions["megatron-core"] == "0.15.3"
    assert re.fullmatch(r"[0-9a-f]{64}", str(status.data_sha256))
    records = [json.loads(line) for line in trained.folder.metrics_file.read_text().splitlines()]
    validation = {record["step"]: record["val/target/loss"] for record in records if "val/target/loss" in record}
    training = [record["train/loss"] for record in records if "train/loss" in record]
    assert list(validation) == [0, 20, 40]
    assert validation[40] < validation[20] < validation[0] - 0.5
    assert len(training) == 40
    assert sum(training[-10:]) / 10 < training[0] - 0.5
    for text in (f"{validation[0]:.4f} at step 0 -> {validation[40]:.4f} at step 40", str(trained.folder.directory)):
        assert text in trained.stdout
    for name in (".hydra/config.yaml", ".hydra/overrides.yaml", "adapter/adapter_config.json", "run.log"):
        assert (trained.folder.directory / name).is_file()
    assert [path.name for path in trained.folder.checkpoints.iterdir()] == ["step=40"]
    assert not (trained.folder.directory.parent / "lightning_logs").exists()


def test_nothing_of_the_base_is_copied(trained: Launched) -> None:
    """Check the tokenizer's directory, which NeMo copies into every checkpoint: it must not be the model's."""
    written = [path.name for path in trained.folder.directory.rglob("*.safetensors")]
    assert written == ["adapter_model.safetensors"]
    assert (next(trained.folder.checkpoints.iterdir()) / "context/tokenizer/tokenizer.json").is_file()


def test_the_log_says_what_was_loaded(trained: Launched) -> None:
    log = trained.folder.log.read_text(encoding="utf-8")
    assert f"[qwen_cl] Loaded {ROOT / 'qwen_cl/demo/model'}: " in log
    assert log.count("[qwen_cl] Loaded") == 1


def test_the_saved_config_is_the_run(trained: Launched) -> None:
    register_schemas()
    config = load_config(trained.folder.config)
    assert config.lr == 5e-4
    assert config.cluster.accelerator.value in ("cpu", "gpu")
    assert config.model.source == str(ROOT / "qwen_cl/demo/model")


def test_without_a_key_w_and_b_is_offline_and_says_so(trained: Launched) -> None:
    notices = [line for line in trained.stdout.splitlines() if line.startswith("W&B:")]
    assert len(notices) == 1
    assert "no API key, logging offline; upload with: wandb sync" in notices[0]


def test_a_folder_that_holds_a_run_is_left_alone(trained: Launched) -> None:
    before = trained.folder.status_file.read_bytes(), trained.folder.config.read_bytes()
    again = launch(directory=trained.folder.directory)
    assert again.returncode == 2
    assert "holds a run already (COMPLETED)" in again.stderr
    assert (trained.folder.status_file.read_bytes(), trained.folder.config.read_bytes()) == before


@pytest.mark.slow
def test_in_use_then_interrupted(tmp_path: Path, row: Row) -> None:
    folder = RunFolder(tmp_path / "run")
    arguments = ["experiment=smoke", "task.max_steps=100000", "task.val_check_interval=100000", "wandb.mode=disabled"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir={folder.directory}", *arguments],
        cwd=tmp_path,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while folder.status().step < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, folder.log.read_text()
        time.sleep(0.2)
    second = launch(*arguments, directory=folder.directory)
    assert second.returncode == 2
    assert "is in use by another run" in second.stderr
    row("the same folder twice", "the second is refused with exit code 2", "nothing")

    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # a launcher gets several at once if its parent is killed
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    status = folder.status()
    assert status.state == "PREEMPTED"
    assert f"step={status.step}" in [path.name for path in folder.checkpoints.iterdir()]
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [
            *("cluster=slurm", "cluster.devices=2", "cluster.account=a", "cluster.partition=p"),
            *("task.packing=false", "speed.activation_recompute=always"),
        ],
    ],
)
def test_dry_run_shows_the_recipe_and_leaves_nothing(arguments: list[str], tmp_path: Path) -> None:
    done = launch("dry_run=true", *arguments, directory=tmp_path / "outputs/run", warm=bool(arguments))
    assert done.returncode == 0, done.stderr
    assert "run.Partial(\n    finetune," in done.stdout
    assert f"restore_config=run.Config(\n            RestoreConfig,\n            path='{ROOT}" in done.stdout
    for fact in ("commit", "tokens per step", "memory", "tensor_parallel 1, pipeline_parallel 1"):
        assert fact in done.stdout
    assert ("#SBATCH --account=a" in done.stdout) == bool(arguments)
    assert ("layers recomputed (speed.activation_recompute)" in done.stdout) == bool(arguments)
    enabled = ["compile", "fused_linear_cross_entropy"] if arguments else []
    enabled += ["fused_lora", *(["fused_grad_accumulation", "activation_recompute"] if arguments else [])]
    assert f"speed optimizations  {', '.join(enabled)}, rope_cache, fused_adam, foreach_grad_clip\n" in done.stdout
    # Transformer Engine's layers do not support packed segments.
    assert ("transformer_layer_spec=segment_layer_spec," in done.stdout) == (not arguments)
    assert ("transformer_layer_spec=layer_spec," in done.stdout) == bool(arguments)
    assert f"packing={not arguments}," in done.stdout
    assert re.search(r"training set  320 rows, 25,\d{3} tokens, .*; median length", done.stdout)
    assert not (tmp_path / "outputs/run").exists()
