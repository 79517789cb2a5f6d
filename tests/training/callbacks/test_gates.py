"""Runs stop at untrained weights and at NaN or infinite values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import cast

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_cl.config.run import RunConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.models.formats.torch_dist import DistributedWeights
from qwen_cl.planning.plan import make_plan
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State
from qwen_cl.training.prepare import write_worker_inputs
from tests.conftest import ROOT, launch
from tests.support import chance_probe
from tests.support.models import save_random_model
from tests.support.ranks import run_ranks

SMOKE = ["experiment=smoke", "task=pretrain", "peft=none", "cluster.accelerator=cpu", "wandb.mode=disabled"]
BAD_STEPS = 40
"""Enough for a learning rate that is far too high to end in what is not finite."""
BAD = [
    "lr=1e8",
    "task.weight_decay=0",
    f"task.max_steps={BAD_STEPS}",
    f"task.log_interval={BAD_STEPS}",
    f"task.val_check_interval={BAD_STEPS}",
    "task.checkpoint_interval=1",
    "task.global_batch_size=2",
]


def probe(directory: Path, *overrides: str) -> tuple[int, RunFolder]:
    """A run whose model is taken for a large one: its exit code and its folder."""
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plan = make_plan(cast(RunConfig, OmegaConf.to_object(compose("config", [*SMOKE, *overrides]))))
    folder = RunFolder(directory)
    folder.directory.mkdir()
    write_worker_inputs(plan, folder)
    folder.update_status(state=State.RUNNING, step=0)
    done = run_ranks(chance_probe.main, str(folder.directory))
    folder.log.write_text(done.log, encoding="utf-8")
    return done.returncode, folder


def test_weights_that_know_nothing_are_refused_before_the_first_step(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", heads=2, kv_groups=1, vocab_size=1536)
    returncode, folder = probe(tmp_path / "run", "model=local", f"model.source={model}")
    assert returncode == 1, folder.log.read_text()[-3000:]
    status = folder.status()
    assert (status.state, status.step) == ("FAILED", 0)
    said = re.fullmatch(
        r"VerificationError: model\.verify: the loss before the first step is ([\d.]+) at best, and that of random "
        r"weights is about ([\d.]+) \(the logarithm of the vocabulary\): it has no trained weights; if "
        r"they are meant to be random, set model\.verify=none",
        str(status.reason),
    )
    assert said is not None, status.reason
    assert said[2] == f"{math.log(1536):.2f}"
    assert float(said[1]) > math.log(1536) - 0.5
    assert status.verified == {}
    assert not list(folder.checkpoints.glob("*"))


@pytest.mark.slow
def test_a_trained_model_passes_and_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """Between two lines of metrics.jsonl too, and were Megatron not to look at the gradients."""
    returncode, folder = probe(tmp_path / "run", "model=tiny", *BAD)
    assert returncode == 1, folder.log.read_text()[-3000:]
    status = folder.status()
    assert status.state == "FAILED"
    said = re.fullmatch(
        r"FloatingPointError: training (?:loss|gradient norm) is (?:nan|inf) at step (\d+); lower lr or "
        r"task\.clip_grad, or raise task\.warmup_steps \(the newest checkpoint is from before\)",
        str(status.reason),
    )
    assert said is not None, status.reason
    assert 1 < int(said[1]) < BAD_STEPS
    assert saved_steps(folder)[-1] == int(said[1]) - 1
    assert newest_is_finite(folder)
    assert [json.loads(line)["step"] for line in folder.metrics_file.read_text().splitlines()] == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("speed", "what"),
    [("fast", r"training (?:loss|gradient norm) is (?:nan|inf) at step \d+"), ("off", "the gradient is (?:nan|inf)")],
)
def test_a_run_without_verification_ends_at_a_nan_step(speed: str, what: str, tmp_path: Path) -> None:
    """Megatron looks at each gradient before the step; levers let it not wait for that."""
    model = save_random_model(tmp_path / "model", heads=2, kv_groups=1, vocab_size=1536)
    said = ["model=local", f"model.source={model}", "model.verify=none", f"speed={speed}"]
    done = launch(*SMOKE, *said, *BAD, directory=tmp_path / "run", warm=True)
    assert done.returncode == 1
    status = done.folder.status()
    assert status.state == "FAILED"
    assert status.verified == {}
    reason = (
        rf"FloatingPointError: {what}; lower lr or task\.clip_grad, or raise task\.warmup_steps "
        r"\(the newest checkpoint is from before\)"
    )
    assert re.fullmatch(reason, str(status.reason))
    assert f"FAILED: {status.reason}\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert newest_is_finite(done.folder)


def saved_steps(folder: RunFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("step=")) for path in folder.checkpoints.iterdir())


def newest_is_finite(folder: RunFolder) -> bool:
    weights = DistributedWeights(folder.checkpoints / f"step={saved_steps(folder)[-1]}" / "weights")
    names = [key for key in weights.keys if key.startswith("module.")]
    assert len(names) > 5
    return all(bool(torch.isfinite(weights.read(name, None)).all()) for name in names)
