"""task.micro_batch_size=auto: what it chooses, that it makes do with less, and that a run keeps what fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import SHAPES
from qwen_cl.config.cluster import Accelerator, Precision
from qwen_cl.config.errors import RunFailed, UserError
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import save_config
from qwen_cl.config.speed import When
from qwen_cl.launch.local import raise_for_status
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.planning.devices import Device
from qwen_cl.planning.micro_batch import SHARE, resolve_micro_batch, retry_on_oom, reuse_micro_batch
from qwen_cl.planning.plan import make_plan
from qwen_cl.runs.folder import RunFolder
from qwen_cl.sweep.slots import Slot
from qwen_cl.sweep.trial import hash_config
from qwen_cl.training.prepare import initialize_run_folder
from tests.conftest import ROOT
from tests.support.composed_configs import compose_run
from tests.support.interrupted_runs import losses, overrides_of, plan, whole_and_killed, worker
from tests.support.ranks import run_ranks

GB = 10**9


def device(kind: Accelerator, memory: int | None) -> Device:
    precision = Precision.bf16 if kind is Accelerator.gpu else Precision.fp32
    return Device(kind, precision, "a device", memory)


def shape(name: str) -> Architecture:
    return read_architecture(SHAPES[name], ROOT)


@pytest.mark.parametrize(
    ("name", "said", "on", "chosen"),
    [
        ("0.5b", ["task.sequence_length=2048"], device(Accelerator.gpu, 141 * GB), 8),  # more would gain nothing
        ("0.5b", ["task.sequence_length=2048"], device(Accelerator.gpu, 24 * GB), 2),  # more would not fit
        ("0.5b", ["task.sequence_length=2048", "speed.compile=always"], device(Accelerator.gpu, 24 * GB), 4),
        ("0.5b", ["task.sequence_length=512"], device(Accelerator.gpu, 141 * GB), 16),  # there are no more
        ("0.5b", ["task.sequence_length=512", "task.global_batch_size=48"], device(Accelerator.gpu, 141 * GB), 24),
        ("0.5b", ["task.sequence_length=32768"], device(Accelerator.gpu, 141 * GB), 1),  # never less
        ("7b", ["task.sequence_length=2048"], device(Accelerator.gpu, 4 * GB), 1),
        ("tiny", ["task.sequence_length=512"], device(Accelerator.cpu, 16 * GB), 4),
        ("tiny", ["task.sequence_length=512", "cluster.devices=8"], device(Accelerator.cpu, 16 * GB), 2),
    ],
)
def test_it_is_what_gains_and_fits(name: str, said: list[str], on: Device, chosen: int) -> None:
    config = compose_run("task.micro_batch_size=auto", "task.global_batch_size=16", *said)
    settled = resolve_micro_batch(config, shape(name), on)
    assert settled.training.resolved_micro_batch_size == chosen
    assert replace(settled, task=config.task) == config
    number = compose_run("task.micro_batch_size=2")
    assert resolve_micro_batch(number, shape(name), on) is number


def test_what_cannot_be_is_refused() -> None:
    config = compose_run("task.micro_batch_size=auto", "cluster=slurm")
    with pytest.raises(UserError, match=r"task\.micro_batch_size=auto uses the memory of this machine's devices"):
        resolve_micro_batch(config, shape("tiny"), device(Accelerator.gpu, None))
    with pytest.raises(UserError, match=r"task\.micro_batch_size \(most\) must be a number of sequences, or auto"):
        compose_run("task.micro_batch_size=most")
    with pytest.raises(UserError, match=r"task\.global_batch_size \(3\) must be a multiple of data_parallel \(2\)"):
        compose_run("task.micro_batch_size=auto", "task.global_batch_size=3", "cluster.devices=2")


def full_from_step_three(folder: RunFolder) -> None:
    """Fail out of memory with more than one sequence in a micro batch."""
    import torch

    from qwen_cl.training.callbacks.metrics import RunRecorder

    stock = RunRecorder.on_train_batch_start

    def start(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 2 and trainer.datamodule.micro_batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        stock(self, trainer, *args, **kwargs)

    patched: Any = RunRecorder
    patched.on_train_batch_start = start


@pytest.mark.slow
def test_it_makes_do_with_less_and_the_result_is_the_same(shared_directory: Path, tmp_path: Path) -> None:
    whole = whole_and_killed(shared_directory, "none")[0]
    folder, tried, reasons = RunFolder(tmp_path / "run"), [], []
    folder.directory.mkdir()
    started = plan(*overrides_of("none"), "task.micro_batch_size=auto")
    assert started.config.training.resolved_micro_batch_size == 4

    def attempt(config: RunConfig) -> None:
        tried.append(config.training.resolved_micro_batch_size)
        with folder.lock():
            initialize_run_folder(replace(started, config=config), folder)
        run_ranks(worker, folder.directory, full_from_step_three)
        reasons.append(folder.status().reason)
        raise_for_status(folder, interrupted=False)

    retry_on_oom(started.config, folder, attempt)
    assert tried == [4, 2, 1]
    advice = "; lower task.micro_batch_size or task.sequence_length, or set speed.activation_recompute=always"
    assert [str(reason).endswith(advice) for reason in reasons] == [True, True, False]
    assert folder.status().state == "COMPLETED"
    assert [entry["step"] for entry in folder.status().resumed] == [2, 2]
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)  # of two rows in a pass
    again = compose_run("task.micro_batch_size=auto", "task.global_batch_size=4")
    assert reuse_micro_batch(again, folder).training.resolved_micro_batch_size == 1
    assert reuse_micro_batch(again, RunFolder(tmp_path / "new")).training.micro_batch_size == "auto"
    number = compose_run("task.micro_batch_size=2")
    assert reuse_micro_batch(number, folder) is number
    chain = RunFolder(tmp_path / "chain")  # a folder of something else is refused later, and not by this
    chain.directory.mkdir()
    save_config(compose_run("task=inspect"), chain.config)
    assert reuse_micro_batch(again, chain) is again


def test_a_trial_has_its_share_of_what_it_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_run("task.micro_batch_size=auto", "task.global_batch_size=16", "task.sequence_length=2048")
    on = device(Accelerator.gpu, 48 * GB)
    assert resolve_micro_batch(config, shape("0.5b"), on).training.resolved_micro_batch_size == 4
    slot = Slot(("0", "1"), 2 / 3, 8)  # three trials on each of two GPUs
    monkeypatch.setenv(SHARE, slot.environment(config.cluster)[SHARE])
    assert resolve_micro_batch(config, shape("0.5b"), on).training.resolved_micro_batch_size == 2


@pytest.mark.slow
def test_what_does_not_fit_otherwise_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["model=tiny", "cluster.accelerator=cpu"]
    assert make_plan(compose_run(*said)).config.speed.activation_recompute is When.never
    monkeypatch.setenv(SHARE, "0.000001")
    for size in ("2", "auto"):
        speed = make_plan(compose_run(*said, f"task.micro_batch_size={size}")).config.speed
        assert (speed.activation_recompute, speed.fused_lora) == (When.always, When.always)
    assert (
        make_plan(compose_run(*said, "speed.activation_recompute=never")).config.speed.activation_recompute
        is When.never
    )


def test_what_was_settled_is_nothing_that_tells_trials_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["task.micro_batch_size=auto", "model=tiny", "cluster.accelerator=cpu"]
    hashes = set()
    for share in ("1", "0.000001"):
        monkeypatch.setenv(SHARE, share)
        made = make_plan(compose_run(*said))
        hashes.add((made.config.training.resolved_micro_batch_size, hash_config(made)))
    assert [size for size, _ in sorted(hashes)] == [1, 4]
    assert len({of for _, of in hashes}) == 1
    assert hash_config(make_plan(compose_run(*said[1:], "task.micro_batch_size=1"))) not in {of for _, of in hashes}


def test_other_failures_and_a_single_row_end_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tried: list[int] = []

    def fails(config: RunConfig) -> None:
        tried.append(config.training.resolved_micro_batch_size)
        raise RunFailed("FAILED")

    config = compose_run("task.micro_batch_size=2", "task.global_batch_size=4")
    folder.update_status(state="FAILED", reason="ValueError: no")
    with pytest.raises(RunFailed):
        retry_on_oom(config, folder, fails)
    assert tried == [2]
    folder.update_status(reason="rank 1: OutOfMemoryError: CUDA out of memory")
    with pytest.raises(RunFailed):
        retry_on_oom(config, folder, fails)
    assert tried == [2, 2, 1]
