"""Metrics do not make a GPU wait: the gradient norm stays on it, and a step is read one step later."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_cl.data.examples import Example
from qwen_cl.runs.folder import RunFolder
from tests.conftest import ROOT
from tests.support.interrupted_runs import AtRecord, losses, measured, overrides_of, train, whole_and_killed
from tests.support.ranks import run_ranks


@dataclass(frozen=True, slots=True)
class ReadLate:
    """A recorder that reads late, as on a GPU, and notes each recorded step with the one that had ended by then."""

    killed_at: int | None = None

    def __call__(self, folder: RunFolder) -> None:
        from qwen_cl.training.callbacks.metrics import RunRecorder

        if self.killed_at is not None:
            AtRecord(self.killed_at, signal.SIGKILL)(folder)
        steps = [0]
        stock_end, stock_append = RunRecorder.on_train_batch_end, RunFolder.append_metrics

        def end(this: RunRecorder, trainer: Any, *others: Any) -> None:
            steps.append(trainer.global_step)
            waits = trainer.strategy.megatron_parallel[0].ddp_config.check_for_nan_in_grad
            (folder.directory / "waits for each gradient").write_text(str(waits))
            stock_end(this, trainer, *others)

        def append(this: RunFolder, line: dict[str, Any]) -> None:
            if "train/loss" in line:
                with (folder.directory / "recorded").open("a") as stream:
                    stream.write(f"{line['step']}:{steps[-1]} ")
            stock_append(this, line)

        patched: Any = RunRecorder
        patched.reads_late, patched.on_train_batch_end = True, end
        patched = RunFolder
        patched.append_metrics = append


@pytest.mark.slow
def test_a_step_that_is_read_later_is_recorded_the_same(shared_directory: Path, tmp_path: Path) -> None:
    """Also where the run is killed and goes on. Before a validation or a checkpoint nothing is left unread."""
    whole = whole_and_killed(shared_directory, "lora")[0]
    folder = RunFolder(tmp_path / "run")
    killed = [*overrides_of("lora"), "task.async_save=false"]
    ended = train(folder, *killed, fault=ReadLate(killed_at=5))
    assert ended.returncode == -signal.SIGKILL, ended.log[-2000:]
    assert list(losses(folder)) == [1, 2, 3, 4]
    assert (folder.directory / "recorded").read_text().split() == ["1:2", "2:2", "3:3", "4:4", "5:6"]
    ended = train(folder, *overrides_of("lora"), fault=ReadLate())
    assert ended.returncode == 0, ended.log[-2000:]
    assert (folder.directory / "recorded").read_text().split()[5:] == ["5:6", "6:6"]
    assert measured(folder) == measured(whole)
    assert (folder.directory / "waits for each gradient").read_text() == "False"


@pytest.mark.slow
def test_a_nan_loss_is_found_a_step_later(shared_directory: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    ended = train(folder, *overrides_of("lora"), "lr=1e30", "task.warmup_steps=0", fault=ReadLate())
    assert ended.returncode == 1
    assert folder.status().state == "FAILED"
    assert "lower lr" in str(folder.status().reason)
    assert not list(folder.checkpoints.glob("*"))


def _norms(out: Path) -> None:
    """Ours and Megatron's, of gradients to clip and of others; and what clipping leaves."""
    import torch
    from megatron.core.optimizer import optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    from qwen_cl.training.setup import prepare
    from qwen_cl.training.speed import grad_norm

    prepare(cpu=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.store", rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    values = [
        [torch.randn(shape, generator=torch.Generator().manual_seed(7)) * size for shape in (5, 40, 300)]
        for size in (0.01, 3.0)
    ]

    def parameters_with(gradients: list[torch.Tensor]) -> list[Any]:
        parameters: list[Any] = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
        return parameters

    theirs, ours = ([parameters_with(gradients) for gradients in values] for _ in range(2))
    norms = [
        get_grad_norm_fp32([each.grad for each in parameters], grad_stats_parallel_group=group) for parameters in theirs
    ]
    for parameters, norm in zip(theirs, norms):
        clip_grad_by_total_norm_fp32(parameters, 1.0, norm)
    part: Any = torch.nn.Linear(1, 1)
    part.config = SimpleNamespace(finalize_model_grads_func=None)
    assert grad_norm.install(torch.nn.ModuleList([part])) == 2
    results = []
    for parameters, reference, gradients, norm in zip(ours, theirs, values, norms):
        own = grad_norm.norm_on_device([each.grad for each in parameters], group)
        optimizer.clip_grad_by_total_norm_fp32(parameters, 1.0, own)  # ours now
        apart = [float((one.grad - two.grad).abs().max()) for one, two in zip(reference, parameters)]
        changed = float((reference[0].grad - gradients[0]).abs().max())
        results.append({"norm": norm, "own": float(own), "apart": max(apart), "changed": changed})
    out.write_text(json.dumps(results))


def test_clipping_on_the_device_is_megatrons(tmp_path: Path) -> None:
    ended = run_ranks(_norms, tmp_path / "norms.json")
    assert ended.returncode == 0, ended.log[-3000:]
    small, large = json.loads((tmp_path / "norms.json").read_text())
    assert small["changed"] == 0 < large["changed"]
    assert small["norm"] < 1 < large["norm"]
    for found in (small, large):
        assert found["own"] == pytest.approx(found["norm"], rel=1e-6)
        assert found["apart"] < 1e-6
    assert small["apart"] == 0


def note_progress(folder: RunFolder) -> None:
    from qwen_cl.training.callbacks.metrics import RunRecorder

    def note(self: Any, done: int, total: int) -> None:
        with (folder.directory / "read").open("a") as stream:
            stream.write(f"{done} {total}\n")

    patched: Any = RunRecorder
    patched.on_weights_read = note


@pytest.mark.slow
def test_reading_the_weights_shows_its_progress(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert train(folder, *overrides_of("none"), "task.max_steps=2", fault=note_progress).returncode == 0
    done, total = (folder.directory / "read").read_text().splitlines()[-1].split()
    assert done == total
    file = (ROOT / "qwen_cl/demo/model/model.safetensors").read_bytes()
    assert int(total) == len(file) - 8 - int.from_bytes(file[:8], "little")  # all but its header


def test_conversations_that_share_a_sequence_attend_within_each() -> None:
    from qwen_cl.training.callbacks.metrics import work_of_step

    alone, packed = Example(list(range(5)), ((1, 5),)), Example(list(range(9)), ((1, 4), (5, 9)), starts=(0, 4))
    data = SimpleNamespace(global_batch_size=2, train_dataset=[None, None, alone, packed])
    # Positions attend to themselves and to those before: 1 + 2 + 3 + 4 alone; 1 + 2 + 3 and 1 + 2 + 3 + 4 packed.
    assert work_of_step(data, 1) == (4 + 3 + 4, 10 + 6 + 10)
