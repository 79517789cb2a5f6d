"""The embedded model trained by several processes: in every layout what one process trains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.plan import make_plan
from qwen_cl.run import write_worker_inputs
from qwen_cl.run_folder import RunFolder
from tests import parallel_probe
from tests.exporting import composed
from tests.ranks import run_ranks

STEPS = 6
LAYOUTS = {
    "one": {},
    "tp2": {"devices": 2, "tensor_parallel": 2},
    "sp2": {"devices": 2, "tensor_parallel": 2, "sequence_parallel": "true"},
    "pp2": {"devices": 2, "pipeline_parallel": 2},
    "dp2": {"devices": 2},
    "cp2": {"devices": 2, "context_parallel": 2},
    "tp2-pp2": {"devices": 4, "tensor_parallel": 2, "pipeline_parallel": 2},
    "sp2-cp2": {"devices": 4, "tensor_parallel": 2, "sequence_parallel": "true", "context_parallel": 2},
}
METHODS = ("lora", "dora", "none")


@dataclass(frozen=True)
class Trained:
    directory: Path

    def records(self, name: str) -> list[dict[str, Any]]:
        """Without what is a matter of time, or of memory."""
        lines = (self.directory / name / "metrics.jsonl").read_text().splitlines()
        timeless = ("time", "throughput/tokens_per_second", "memory/peak_gib")
        return [{key: value for key, value in json.loads(line).items() if key not in timeless} for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every layout and method, by groups of as many ranks."""
    directory = tmp_path_factory.mktemp("parallel")
    by_ranks: dict[int, list[tuple[Path, str]]] = {}
    for layout, sizes in LAYOUTS.items():
        for method in METHODS:
            folder = directory / f"{method}-{layout}"
            _prepare(folder, method, sizes)
            by_ranks.setdefault(int(sizes.get("devices", 1)), []).append((folder, "whole"))
    for ranks, folders in by_ranks.items():
        done = run_ranks(parallel_probe.main, folders, ranks=ranks)
        assert done.returncode == 0, done.log[-4000:]
    return Trained(directory)


def _prepare(folder: Path, method: str, sizes: dict[str, Any]) -> None:
    overrides = [f"peft={method}", "experiment=smoke", "wandb.mode=disabled", "cluster.accelerator=cpu"]
    overrides += [f"cluster.{key}={value}" for key, value in sizes.items()]
    overrides += [f"task.max_steps={STEPS}", "task.micro_batch_size=1", "task.global_batch_size=2", "task.sequence_length=96", "task.sample_prompts=0", "lr=2e-3", "retention=none"]
    overrides += ["task.val_check_interval=100", "task.checkpoint_interval=100", "model.verify=none"]
    plan = make_plan(composed(*overrides))
    folder.mkdir(exist_ok=True)
    write_worker_inputs(plan, RunFolder(folder))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layout_trains_what_one_process_trains(method: str, layout: str, trained: Trained) -> None:
    expected, found = (trained.records(f"{method}-{name}") for name in ("one", layout))
    losses = [record["train/loss"] for record in expected if "train/loss" in record]
    assert len(losses) == STEPS
    assert losses[0] - losses[-1] > 0.1, "training changed nothing, so this test shows nothing"
    assert [list(record) for record in found] == [list(record) for record in expected]
    for one, other in zip(expected, found):
        assert other == pytest.approx(one, rel=1e-4), one["step"]
