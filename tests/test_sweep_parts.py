"""What a sweep does before its first trial and after its last; nothing is trained here."""

from __future__ import annotations

import csv
import io
import json
import re
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from qwen_cl.config.clusters import SlurmConfig
from qwen_cl.config.errors import UserError, explain
from qwen_cl.config.schema import Accelerator, LocalConfig, Precision
from qwen_cl.config.store import HYDRA_GROUPS, register_schemas
from qwen_cl.config.sweep import LauncherConfig
from qwen_cl.plan import Plan
from qwen_cl.report.report import write_report
from qwen_cl.run_folder import RunFolder
from qwen_cl.sweep import slots
from qwen_cl.sweep.folder import settled
from qwen_cl.sweep.grid import plan_trials
from qwen_cl.sweep.planning import Planner, composer
from qwen_cl.sweep.results import best_of, print_results, read_results, write_results
from qwen_cl.sweep.trial import Trial, trial_name, write_json
from qwen_cl.sweep.view import SweepView
from tests.conftest import ROOT


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


@pytest.mark.parametrize("path", sorted(ROOT.glob("conf/hydra/*/*.yaml")), ids=lambda path: str(path.stem))
def test_every_option_has_its_value_in_a_file_that_says_what_it_is(path: Path) -> None:
    schema = HYDRA_GROUPS[f"hydra/{path.parent.name}"][f"{path.stem}_schema"]
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"[a-z_]+: ", line)]
    said = {line.split(":")[0]: " # " in line for line in lines if not line.startswith("defaults")}
    assert said == {field.name: True for field in fields(schema) if field.name != "_target_"}


def multirun(directory: Path, *said: str) -> None:
    """``launch.py -m`` in this process; mistakes end as the launcher tells them."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    overrides = [f"hydra.sweep.dir={directory}", "cluster.accelerator=cpu", *said]
    try:
        hydra.multirun("config", lambda cfg: None, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def dry_run(directory: Path, capsys: pytest.CaptureFixture[str], *said: str) -> list[str]:
    """The lines that are printed."""
    multirun(directory, "dry_run=true", *said)
    assert not directory.exists()
    return capsys.readouterr().out.splitlines()


def test_a_key_that_a_choice_lacks_is_left_out_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(tmp_path / "sweep", capsys, "peft=lora,none", "peft.rank=8,32", "lr=1e-4,3e-4")
    assert lines[0] == "peft.rank is left out where peft=none, which has none"
    assert lines[1].startswith("6 trials, ")
    said = [line.split("dry_run=true ")[1] for line in lines[2:]]
    assert said == [
        "peft=lora peft.rank=8 lr=0.0001",
        "peft=lora peft.rank=8 lr=0.0003",
        "peft=lora peft.rank=32 lr=0.0001",
        "peft=lora peft.rank=32 lr=0.0003",
        "peft=none lr=0.0001",
        "peft=none lr=0.0003",
    ]
    assert lines[4].startswith("02-lora-rank_32-lr_0.0001 ")
    assert lines[6].startswith("04-none-lr_0.0001 ")


def test_a_sweep_on_slurm_shows_its_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "sweep"
    lines = dry_run(directory, capsys, "cluster=slurm", "lr=1e-4,2e-4", "cluster.devices=1,2")
    assert lines[0] == f"4 trials, 4 at a time in Slurm's queue, in {directory}"
    arrays = [number for number, line in enumerate(lines) if line == "#SBATCH --array=0-1"]
    tasks = [line.rpartition("=")[2] for line in lines if line.startswith("#SBATCH --ntasks-per-node=")]
    assert tasks == ["1", "2"]
    assert len(arrays) == 2
    one = dry_run(directory, capsys, "cluster=slurm", "lr=1e-4,2e-4", "cluster.array=false")
    assert [line for line in one if line.startswith("#SBATCH --array")] == []
    assert len([line for line in one if line.startswith("directory=")]) == 2


def test_what_is_said_twice_is_one_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(tmp_path / "sweep", capsys, "lr=1e-4,0.0001,2e-4", "peft=lora")
    assert [line.split()[0] for line in lines] == ["2", "00-lr_0.0001", "01-lr_0.0002"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["lr=1e-4,-1", "seed=1,2"], "trial lr=-1 seed=1: lr (-1.0) must be above 0"),
        (["peft.rank=8,0"], "trial peft.rank=0: peft.rank (0) must be at least 1"),
        (
            ["peft=lora,none", "peft.rnk=8,9"],
            "trial peft=lora peft.rnk=8: peft.rnk: unknown key; did you mean peft.rank?",
        ),
        (["peft=none", "peft.rank=8,16"], "trial peft.rank=8: peft.rank: unknown key (keys of peft: default_lr)"),
        (["model=tiny,large"], "model=large: no such choice (choices: hub, local,"),
        (["+lrr=1,2"], "trial +lrr=1: lrr: unknown key; did you mean lr?"),
        (["task.sequence_length=512,8192"], "trial task.sequence_length=8192: task.sequence_length (8192) must be"),
        (
            ["task=inspect"],
            "trial cluster.accelerator=cpu task=inspect: a trial trains: task=finetune or task=pretrain",
        ),
        (
            ["hydra/sweeper=optuna", "hydra/launcher=basic", "lr=1,2"],
            "hydra/launcher=basic runs its trials in batches, which hydra/sweeper=optuna does not make; remove it",
        ),
        (["hydra/sweeper=optuna", "lr=interval(-1,1)"], "trial lr=-1: lr (-1.0) must be above 0"),
        (["hydra/sweeper=optuna", "n_trials=3", "lr=1,2"], "n_trials: unknown key"),
        (["lr=interval(1e-5,1e-3)"], "lr=interval(1e-5,1e-3) has no end of values, for hydra/sweeper=grid; write"),
        (
            ["cluster=slurm", "replay=generated", "lr=1e-3,1e-4"],
            "trial lr=0.001: replay=generated is written where the command is; for a sweep on a cluster write it once",
        ),
        (["cluster=docker", "cluster.image=i", "lr=1,2"], "a sweep runs with cluster=local or cluster=slurm; nothing"),
        (["hydra.launcher.jobs=0"], "hydra.launcher.jobs (0) must be at least 1"),
        (["hydra.launcher.cpu_slots=0"], "hydra.launcher.cpu_slots (0) must be at least 1"),
        (["hydra.launcher.gpus_per_trial=0"], "hydra.launcher.gpus_per_trial (0) must be at least 1"),
        (["hydra.launcher.trials_per_gpu=0"], "hydra.launcher.trials_per_gpu (0) must be at least 1"),
        (["hydra.launcher.max_retries=-1"], "hydra.launcher.max_retries (-1) must be at least 0"),
        (["hydra.launcher.gpus=[0,1]"], "hydra.launcher.gpus (0, 1) would change nothing: the trials run on the CPU"),
        (["hydra.launcher.slots=2"], "hydra.launcher.slots: unknown key; did you mean hydra.launcher.cpu_slots? (keys"),
    ],
)
def test_one_bad_trial_refuses_the_sweep(said: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        multirun(tmp_path / "sweep", *said)
    assert str(refused.value).startswith(message)
    assert not (tmp_path / "sweep").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"^hydra.sweep.dir \(.*/file/sweep\) cannot be made: Not a directory; choose"):
        multirun(tmp_path / "file/sweep", "lr=1e-4,2e-4")


def test_a_search_shows_the_ends_of_its_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = ["peft=lora,none", "peft.rank=int(interval(4,64))", "lr=tag(log,interval(1e-5,1e-2))"]
    lines = dry_run(tmp_path / "sweep", capsys, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=7", *space)
    assert lines[0].startswith("7 trials, ")
    said = [line.split("dry_run=true ")[1] for line in lines[1:]]
    assert said == ["peft=lora peft.rank=4 lr=1e-05", "peft=none lr=0.01"]


def test_a_folder_name_needs_no_quotes() -> None:
    values = {"lr": "1e+30", "model": "hub", "model.source": "hf://Org/Name@v1", "retention.sets": "{a: 'b c'}"}
    assert trial_name(7, values) == "07-lr_1e30-hub-source_Org-Name-v1-sets_-a-b-c"
    assert trial_name(7, {}) == "07"
    assert trial_name(12, {"lr": "1e-4", "peft.rank": "8"}) == "12-lr_1e-4-rank_8"


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
    monkeypatch.setattr(slots, "gpu_names", lambda: ["4", "5", "6", "7"])  # of a machine that this one is not
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
        ({"gpus": ["4", "4"]}, 1, r"^hydra.launcher.gpus \(4, 4\) names one twice; hydra.launcher.trials_per_gpu"),
        ({}, 3, r"^a trial takes 3 GPUs .* and the sweep has 2 \(4, 5\); lower it, or give more"),
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
    overrides = ["cluster=slurm", f"cluster.devices={devices}", f"cluster.nodes={nodes}"]
    return cast(SlurmConfig, OmegaConf.to_object(compose("config", overrides).cluster))


def test_a_cluster_takes_all_trials_or_as_many_as_are_said() -> None:
    all_of_them = slots.make_slots(launcher(), [slurm(1), slurm(2, nodes=2)], 9)
    assert [(slot.gpus, slot.cost) for slot in all_of_them] == [((), 4)] * 9
    assert len(slots.make_slots(launcher(jobs=3), [slurm(1)], 9)) == 3


@pytest.mark.parametrize(
    ("options", "clusters", "message"),
    [
        ({"gpus": ["0"]}, ["slurm"], r"^hydra.launcher.gpus \(0\) would change nothing: the trials are Slurm's"),
        ({"cpu_slots": 2}, ["slurm"], r"^hydra.launcher.cpu_slots \(2\) would change nothing: the trials are Slurm's"),
        ({"jobs": 2}, ["local"], r"^hydra.launcher.jobs \(2\) would change nothing on this machine"),
        ({}, ["local", "slurm"], "^cluster=local,slurm: the trials of a sweep run here or there"),
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


def write_trial(directory: Path, number: int, losses: tuple[float, ...], kept: tuple[float, ...], **said: str) -> None:
    """As a completed trial leaves it; no losses: as one that failed."""
    name = trial_name(number, said)
    folder = RunFolder(directory / name)
    folder.directory.mkdir()
    record = {"number": number, "name": name, "overrides": [f"{key}={value}" for key, value in said.items()]}
    costs = {"attempts": 1, "seconds": 60.0, "gpu_seconds": 20.0}
    write_json(
        {**record, **costs, "differing": said, "max_steps": 8, "config_hash": str(number)},
        folder.directory / "trial.json",
    )
    folder.config.write_text("task: {max_steps: 8}\ncluster: {devices: 1}\n", encoding="utf-8")
    (folder.directory / ".hydra").mkdir()
    (folder.directory / ".hydra/overrides.yaml").write_text(json.dumps(record["overrides"]), encoding="utf-8")
    folder.update_status(state="COMPLETED" if losses else "FAILED", reason=None if losses else "it broke", step=8)
    for step, (loss, old) in enumerate(zip(losses, kept)):
        folder.append_metrics(
            {"step": 4 * step, "time": float(step), "val/target/loss": loss, "retention/old/loss": old}
        )
        rate = {"throughput/tokens_per_second": 100.0 * (step + 1)}
        folder.append_metrics({"step": 4 * step, "time": step + 0.5, "train/loss": loss + 0.5, **rate})


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """lr x rank with one failure."""
    for number, (rate, rank, losses, kept) in enumerate(
        [
            ("1e-4", "8", (5.0, 4.0, 3.5), (2.0, 2.0, 2.1)),
            ("1e-4", "32", (5.0, 3.8, 3.2), (2.0, 2.1, 2.3)),
            ("1e-3", "8", (5.0, 3.0, 2.5), (2.0, 2.2, 2.4)),
            ("1e-3", "32", (), ()),
            ("3e-4", "8", (5.0, 3.5, 3.3), (2.0, 2.2, 2.5)),
        ]
    ):
        write_trial(tmp_path, number, losses, kept, lr=rate, **{"peft.rank": rank})
    write_trial(tmp_path, 9, (1.0,), (1.0,), lr="9")
    (tmp_path / "09-lr_9").rename(tmp_path / "09-lr_9.cut-off-1")
    return tmp_path


def test_the_answer_names_the_best_by_how_much_and_the_cost(finished: Path) -> None:
    results = read_results(finished)
    assert [result.number for result in results] == [2, 1, 4, 0, 3]
    best = best_of(results)
    assert best is not None
    assert (best.name, best.val_loss, best.first_val_loss, best.train_loss) == ("02-lr_1e-3-rank_8", 2.5, 5.0, 3.0)
    assert best.forgotten == pytest.approx(0.4)
    assert best.tokens_per_second == 300.0
    console = Console(file=io.StringIO(), width=160)
    print_results(results, [("time", "9 s")], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\* +02 +COMPLETED +1e-3 +8 +2\.5000 +\+0\.4000 +3\.0000 +300 +60 +20", text)
    assert re.search(r"^ +01 +COMPLETED +1e-4 +32 +3\.2000 +0\.7000 +\+0\.3000 ", text, re.MULTILINE)
    assert "03-lr_1e-3-rank_32: FAILED, it broke" in text
    assert "best  02-lr_1e-3-rank_8, validation loss 2.5000, 0.7000 (21.9%) below the next, 01-lr_1e-4-rank_32" in text
    write_results(finished, results, {"seconds": 9.0})
    summary = json.loads((finished / "sweep.json").read_text())
    assert summary["best"] == "02-lr_1e-3-rank_8"
    assert [one["number"] for one in summary["results"]] == [2, 1, 4, 0, 3]
    rows = list(csv.DictReader((finished / "sweep.csv").read_text().splitlines()))
    assert [row["val_loss"] for row in rows] == ["2.5", "3.2", "3.3", "3.5", ""]
    assert [row["peft.rank"] for row in rows] == ["8", "32", "8", "8", "32"]
    assert rows[0]["retention/old/loss"] == "2.4"


def test_the_page_and_its_pictures_show_the_same_trials(finished: Path, tmp_path: Path) -> None:
    best = best_of(read_results(finished))
    assert best is not None
    page, *drawn = write_report(finished)
    assert [path.name for path in drawn] == ["loss-curves.png", "lr-rank.png", "pareto.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert f"Best: {best.name}, target loss 2.5000" in page.read_text(encoding="utf-8")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no runs"):
        write_report(tmp_path / "none")
    assert best_of([]) is None


def test_a_terminal_shows_a_line_a_trial(finished: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=30)
    view = SweepView(console)
    config = types.SimpleNamespace(training=types.SimpleNamespace(max_steps=8))
    for result in read_results(finished):
        folder = RunFolder(finished / result.name)
        plan = cast(Plan, types.SimpleNamespace(config=config))
        view.add(Trial(result.number, result.name, (), result.differing, folder, plan, ""), result.state)
    console.print(view.table())
    text = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "4 COMPLETED, 1 FAILED, 0:00" in text
    assert re.search(r"02-lr_1e-3-rank_8 +COMPLETED +8/8 +3\.000 +2\.500 +300", text)
    line = view.lines["02-lr_1e-3-rank_8"]
    assert "it broke" in text
    assert line.seconds_left() == 0.0
    # The first of its training steps was logged at 0.5 s.
    line.latest.update(step=5, time=1.5)
    assert line.seconds_left() == pytest.approx((1.5 - 0.5) / 5 * 3)


def test_a_trial_that_fits_no_layout_refuses_the_sweep(hydra: None, tmp_path: Path) -> None:
    """Also where another, which differs in its adapter alone, fits."""
    hydra_now = GlobalHydra.instance().hydra
    assert hydra_now is not None
    common = ["cluster.accelerator=cpu", "cluster.devices=2", "cluster.tensor_parallel=2"]
    master = hydra_now.compose_config("config", common, run_mode=RunMode.MULTIRUN)
    planner = Planner(composer(hydra_now.config_loader, master))
    with pytest.raises(UserError, match=r"^trial peft\.rank=9: .*tensor_parallel"):
        plan_trials([[*common, f"peft.rank={rank}"] for rank in (8, 9)], planner, tmp_path)


def test_a_sweep_that_gets_more_values_keeps_its_trials(hydra: None, tmp_path: Path) -> None:
    hydra_now = GlobalHydra.instance().hydra
    assert hydra_now is not None
    master = hydra_now.compose_config("config", ["cluster.accelerator=cpu"], run_mode=RunMode.MULTIRUN)
    planner = Planner(composer(hydra_now.config_loader, master))
    (only,) = plan_trials([["cluster.accelerator=cpu", "lr=1e-4"]], planner, tmp_path)
    assert (only.name, only.differing) == ("00", {})
    only.begin({}, 0.5, ("3",))
    assert only.record()["visible_devices"] == ["3"]
    only.folder.update_status(state="COMPLETED", reason=None, end="2026-01-01T00:00:00+00:00")
    more = [
        ["cluster.accelerator=cpu", f"lr={lr}", f"peft.rank={rank}"] for lr in ("1e-4", "3e-4") for rank in (16, 32)
    ]
    trials = plan_trials(more, planner, tmp_path)
    # 32 is what peft.rank was without being said.
    assert [trial.name for trial in trials] == ["01-lr_1e-4-rank_16", "00", "02-lr_3e-4-rank_16", "03-lr_3e-4-rank_32"]
    assert [trial.name for trial in settled(trials)] == ["00"]
    assert only.record()["differing"] == {"lr": "1e-4", "peft.rank": "32"}
    assert only.record()["attempts"] == 1
