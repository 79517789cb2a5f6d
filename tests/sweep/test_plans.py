"""The checks of a sweep before its first trial; nothing is trained here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from qwen_cl.config.errors import UserError
from qwen_cl.config.hydra_errors import explain
from qwen_cl.config.store import HYDRA_GROUPS, register_schemas
from qwen_cl.sweep.folder import finished_trials
from qwen_cl.sweep.grid import plan_trials
from qwen_cl.sweep.planning import Planner, composer
from qwen_cl.sweep.trial import trial_name
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
    """Run ``launch.py -m`` in this process; errors are raised as the launcher explains them."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    overrides = [f"hydra.sweep.dir={directory}", "cluster.accelerator=cpu", *said]
    try:
        hydra.multirun("config", lambda cfg: None, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def dry_run(directory: Path, capsys: pytest.CaptureFixture[str], *said: str) -> list[str]:
    """Return the printed lines of a dry run."""
    multirun(directory, "dry_run=true", *said)
    assert not directory.exists()
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_a_key_that_a_choice_lacks_is_left_out_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(tmp_path / "sweep", capsys, "peft=lora,none", "peft.rank=8,32", "lr=1e-4,3e-4")
    assert lines[0] == "peft.rank is dropped for peft=none, which has no such key"
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


@pytest.mark.slow
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
            "trial cluster.accelerator=cpu task=inspect: a trial must train a model: task=finetune or task=pretrain",
        ),
        (
            ["hydra/sweeper=optuna", "hydra/launcher=basic", "lr=1,2"],
            "hydra/launcher=basic runs batches of trials, and hydra/sweeper=optuna proposes one at a time; remove it",
        ),
        (["hydra/sweeper=optuna", "lr=interval(-1,1)"], "trial lr=-1: lr (-1.0) must be above 0"),
        (["hydra/sweeper=optuna", "n_trials=3", "lr=1,2"], "n_trials: unknown key"),
        (
            ["lr=interval(1e-5,1e-3)"],
            "lr=interval(1e-5,1e-3) is an interval, which hydra/sweeper=grid cannot enumerate",
        ),
        (
            ["cluster=slurm", "replay=generated", "lr=1e-3,1e-4"],
            "trial lr=0.001: replay=generated samples its text on this machine; for a sweep on a cluster sample it",
        ),
        (["cluster=docker", "cluster.image=i", "lr=1,2"], "a sweep runs with cluster=local or cluster=slurm; other"),
        (["hydra.launcher.jobs=0"], "hydra.launcher.jobs (0) must be at least 1"),
        (["hydra.launcher.cpu_slots=0"], "hydra.launcher.cpu_slots (0) must be at least 1"),
        (["hydra.launcher.gpus_per_trial=0"], "hydra.launcher.gpus_per_trial (0) must be at least 1"),
        (["hydra.launcher.trials_per_gpu=0"], "hydra.launcher.trials_per_gpu (0) must be at least 1"),
        (["hydra.launcher.max_retries=-1"], "hydra.launcher.max_retries (-1) must be at least 0"),
        (["hydra.launcher.gpus=[0,1]"], "hydra.launcher.gpus (0, 1) has no effect: the trials run on the CPU"),
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
    with pytest.raises(
        UserError, match=r"^hydra.sweep.dir \(.*/file/sweep\) cannot be created: Not a directory; choose"
    ):
        multirun(tmp_path / "file/sweep", "lr=1e-4,2e-4")


def test_a_search_shows_the_ends_of_its_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = ["peft=lora,none", "peft.rank=int(interval(4,64))", "lr=tag(log,interval(1e-5,1e-2))"]
    lines = dry_run(tmp_path / "sweep", capsys, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=7", *space)
    assert lines[0].startswith("7 trials, ")
    said = [line.split("dry_run=true ")[1] for line in lines[1:]]
    assert said == ["peft=lora peft.rank=4 lr=1e-05", "peft=none lr=0.01"]


def test_a_folder_name_needs_no_quotes() -> None:
    values = {"lr": "1e+30", "model": "hub", "model.source": "hf://Org/Name@v1", "retention.eval_sets": "{a: 'b c'}"}
    assert trial_name(7, values) == "07-lr_1e30-hub-source_Org-Name-v1-eval_sets_-a-b-c"
    assert trial_name(7, {}) == "07"
    assert trial_name(12, {"lr": "1e-4", "peft.rank": "8"}) == "12-lr_1e-4-rank_8"


def test_a_trial_that_fits_no_layout_refuses_the_sweep(hydra: None, tmp_path: Path) -> None:
    """Refuse it also if another trial, which differs only in its adapter, fits."""
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
    # 32 is the default of peft.rank.
    assert [trial.name for trial in trials] == ["01-lr_1e-4-rank_16", "00", "02-lr_3e-4-rank_16", "03-lr_3e-4-rank_32"]
    assert [trial.name for trial in finished_trials(trials)] == ["00"]
    assert only.record()["differing"] == {"lr": "1e-4", "peft.rank": "32"}
    assert only.record()["attempts"] == 1
