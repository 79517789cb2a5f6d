"""The slots of trials: GPUs or cores, and their number."""

from __future__ import annotations

from typing import Any, cast

import pytest

from qwen_cl.config.cluster import Accelerator, LocalConfig, Precision, SlurmConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.sweep import LauncherConfig
from qwen_cl.sweep import slots
from tests.support.exporting import composed


def launcher(**options: Any) -> LauncherConfig:
    values: dict[str, Any] = {"gpus": None, "gpus_per_trial": None, "trials_per_gpu": 1, "cpu_slots": None}
    values |= {"jobs": None, "max_retries": 0, "fail_fast": False}
    return LauncherConfig(**{**values, **options})


def cluster(accelerator: Accelerator, devices: int = 1) -> LocalConfig:
    return LocalConfig(
        accelerator=accelerator,
        devices=devices,
        tensor_parallel=1,
        pipeline_parallel=1,
        context_parallel=1,
        sequence_parallel=False,
        precision=Precision.auto,
        timeout_minutes=30,
    )


@pytest.mark.parametrize(
    ("options", "devices", "expected"),
    [
        ({}, 1, [("4",), ("5",), ("6",), ("7",)]),
        ({}, 2, [("4", "5"), ("6", "7")]),
        ({}, 3, [("4", "5", "6")]),
        ({"gpus": ["7", "5"]}, 1, [("7",), ("5",)]),
        ({"gpus": ["4", "5"], "trials_per_gpu": 2}, 1, [("4",), ("5",), ("4",), ("5",)]),
        ({"gpus_per_trial": 4}, 2, [("4", "5", "6", "7")]),
    ],
)
def test_gpus_are_shared_out(
    options: dict[str, Any], devices: int, expected: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "gpu_names", lambda: ["4", "5", "6", "7"])  # the GPUs of another machine
    found = slots.make_slots(launcher(**options), [cluster(Accelerator.gpu, devices)], 9)
    assert [slot.gpus for slot in found] == expected
    shared = options.get("trials_per_gpu", 1)
    assert {slot.cost for slot in found} == {len(expected[0]) / shared}
    assert found[0].environment(cluster(Accelerator.gpu)) == {
        "CUDA_VISIBLE_DEVICES": ",".join(expected[0]),
        "QWEN_CL_DEVICE_SHARE": str(1 / shared),
    }


@pytest.mark.parametrize(
    ("options", "devices", "message"),
    [
        ({"gpus": ["0"]}, 1, r"^hydra.launcher.gpus \(0\) is not visible here; there are 4, 5$"),
        (
            {"gpus": ["4", "4"]},
            1,
            r"^hydra.launcher.gpus \(4, 4\) names a GPU twice; set hydra.launcher.trials_per_gpu",
        ),
        ({}, 3, r"^a trial needs 3 GPUs .* and the sweep has 2 \(4, 5\); lower it, or list more"),
        ({"gpus_per_trial": 1}, 2, r"^cluster.devices \(2\) is more than hydra.launcher.gpus_per_trial \(1\)"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    options: dict[str, Any], devices: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "gpu_names", lambda: ["4", "5"])
    with pytest.raises(UserError, match=message):
        slots.make_slots(launcher(**options), [cluster(Accelerator.gpu, devices)], 9)


def slurm(devices: int, nodes: int = 1) -> SlurmConfig:
    overrides = ["cluster=slurm", f"cluster.devices={devices}", f"cluster.nodes={nodes}", "task.global_batch_size=8"]
    return cast(SlurmConfig, composed(*overrides).cluster)


def test_a_cluster_takes_all_trials_or_as_many_as_are_said() -> None:
    all_of_them = slots.make_slots(launcher(), [slurm(1), slurm(2, nodes=2)], 9)
    assert [(slot.gpus, slot.cost) for slot in all_of_them] == [((), 4)] * 9
    assert len(slots.make_slots(launcher(jobs=3), [slurm(1)], 9)) == 3


@pytest.mark.parametrize(
    ("options", "clusters", "message"),
    [
        ({"gpus": ["0"]}, ["slurm"], r"^hydra.launcher.gpus \(0\) has no effect on Slurm jobs"),
        ({"cpu_slots": 2}, ["slurm"], r"^hydra.launcher.cpu_slots \(2\) has no effect on Slurm jobs"),
        ({"jobs": 2}, ["local"], r"^hydra.launcher.jobs \(2\) has no effect on this machine"),
        ({}, ["local", "slurm"], "^cluster=local,slurm: the trials of a sweep run all here or all on Slurm"),
    ],
)
def test_slots_that_are_not_the_clusters_are_refused(
    options: dict[str, Any], clusters: list[str], message: str
) -> None:
    chosen = [slurm(1) if name == "slurm" else cluster(Accelerator.cpu) for name in clusters]
    with pytest.raises(UserError, match=message):
        slots.make_slots(launcher(**options), chosen, 9)


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(slots, "cpu_cores", lambda: 8)
    assert len(slots.make_slots(launcher(), [cluster(Accelerator.cpu)], 9)) == 4
    two = slots.make_slots(launcher(cpu_slots=2), [cluster(Accelerator.cpu)], 9)
    assert len(two) == 2
    assert two[0].environment(cluster(Accelerator.cpu)) == {"OMP_NUM_THREADS": "4", "QWEN_CL_DEVICE_SHARE": "0.5"}
    assert two[0].environment(cluster(Accelerator.cpu, devices=2)) == {
        "OMP_NUM_THREADS": "2",
        "QWEN_CL_DEVICE_SHARE": "0.5",
    }
