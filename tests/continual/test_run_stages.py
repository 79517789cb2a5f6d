"""``task=continual``: stages that are stopped and resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_cl.config.errors import RunFailed, UserError
from qwen_cl.config.run import RunConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.config.task.continual import ContinualConfig
from qwen_cl.continual.child_process import launch
from qwen_cl.continual.run_stages import continual
from qwen_cl.continual.stages import last_values
from tests import conftest as launcher
from tests.conftest import ROOT
from tests.support.invocations import invocation
from tests.support.models import DEMO_MODEL

pytestmark = pytest.mark.slow

DATA = ROOT / "qwen_cl/demo/data"
SETS = f"task.sets={{ja: '{DATA / 'text.validation.jsonl'}', chat: '{DATA / 'instructions.validation.jsonl'}'}}"
SHORT = "'task.max_steps=2', 'task.warmup_steps=0', 'task.global_batch_size=8', 'task.sequence_length=256'"
JAPANESE = f"{{name: japanese, overrides: ['task=pretrain', 'lr=5e-3', {SHORT}], eval_sets: [ja]}}"
CHAT = f"{{name: chat, overrides: ['peft=none', 'lr=1e-3', {SHORT}], eval_sets: [chat]}}"
SHARED = ["cluster.accelerator=cpu", "wandb.mode=disabled"]
COMMON = ["task=continual", SETS, "task.evaluation=['task.sequence_length=256']", *SHARED]
COMMAND = [*COMMON, f"task.stages=[{JAPANESE}, {CHAT}]"]


def run_here(directory: Path, *said: str) -> None:
    """Do in this process what the launcher does with a composed config; stages and evaluations are child processes."""
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = cast(RunConfig, OmegaConf.to_object(compose("config", list(said))))
        assert isinstance(config.task, ContinualConfig)
        continual(config, config.task, invocation(*said, directory=directory))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def states(directory: Path) -> list[str]:
    return [stage["state"] for stage in read(directory / "status.json")["stages"]]


def wait_for(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not holds():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], str]:
    """Run one stage, then two, stopped in the second and resumed.

    Return the folder, the times when the first stage and the first evaluation ended, and the output of the resumed run.
    """
    directory = tmp_path_factory.mktemp("continual") / "chain"
    alone = launcher.launch(*COMMON, f"task.stages=[{JAPANESE}]", directory=directory, warm=True)
    assert alone.returncode == 0, alone.stderr
    command = [sys.executable, "launch.py", f"hydra.run.dir={directory}", *COMMAND]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    second_stage = directory / "02-chat/status.json"
    # Its launcher handles signals by the time its worker reports a phase.
    wait_for(lambda: second_stage.exists() and read(second_stage)["phase"] != "starting", first)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate()
    assert first.returncode == 130, said
    assert f"PREEMPTED in stage chat; the same command with hydra.run.dir={directory} resumes there" in said
    assert "Traceback" not in said
    assert read(directory / "status.json")["state"] == "PREEMPTED"
    assert states(directory) == ["COMPLETED", "PREEMPTED"]
    ended = [(directory / name).stat().st_mtime for name in ("01-japanese/status.json", "00-before/evaluation.json")]
    again = launcher.launch(*COMMAND, directory=directory, warm=True)
    assert again.returncode == 0, again.stderr
    return directory, ended, again.stdout


def test_it_resumes_where_it_was_stopped(chain: tuple[Path, list[float], str]) -> None:
    directory, ended, said = chain
    now = [(directory / name).stat().st_mtime for name in ("01-japanese/status.json", "00-before/evaluation.json")]
    assert now == ended
    assert "stage 1 of 2: japanese is already completed" in said
    assert read(directory / "status.json")["state"] == "COMPLETED"
    assert states(directory) == ["COMPLETED", "COMPLETED"]
    assert [cut["state"] for cut in read(directory / "02-chat/status.json")["resumed"]] == ["PREEMPTED"]


def test_a_stage_starts_from_what_the_one_before_became(chain: tuple[Path, list[float], str]) -> None:
    """Check that the second stage starts at the loss of the first one's merged model."""
    directory, *_ = chain
    merged = directory / "01-japanese/export-merged"
    config = yaml.safe_load((directory / "02-chat/config.yaml").read_text())
    assert config["model"]["source"] == str(merged)
    assert config["cluster"]["accelerator"] == "cpu"
    before = read(directory / "00-before/evaluation.json")["sets"]["chat"]["loss"]
    after = read(directory / "01-japanese/evaluation.json")["sets"]["chat"]["loss"]
    records = [json.loads(line) for line in (directory / "02-chat/metrics.jsonl").read_text().splitlines()]
    validation = {record["step"]: record["val/target/loss"] for record in records if "val/target/loss" in record}
    assert validation[0] == pytest.approx(after, abs=1e-4)
    assert abs(before - after) > 1e-3
    assert validation[2] == pytest.approx(read(directory / "02-chat/evaluation.json")["sets"]["chat"]["loss"], abs=1e-4)


def test_the_matrix_holds_every_evaluation_and_its_measures(chain: tuple[Path, list[float], str]) -> None:
    directory, _, said = chain
    matrix = read(directory / "matrix.json")
    assert (matrix["rows"], matrix["sets"]) == (["before", "japanese", "chat"], ["ja", "chat"])
    assert matrix["learned_in"] == ["japanese", "chat"]
    for value in ("loss", "bits_per_byte"):
        rows = [
            [read(directory / folder / "evaluation.json")["sets"][name][value] for name in ("ja", "chat")]
            for folder in ("00-before", "01-japanese", "02-chat")
        ]
        assert matrix[value] == rows
        measures = matrix["measures"][value]
        assert measures["average"] == pytest.approx(sum(rows[2]) / 2)
        assert measures["backward"] == pytest.approx(rows[1][0] - rows[2][0])
        assert measures["forward"] == pytest.approx(rows[0][1] - rows[1][1])
        assert measures["forgetting"] == pytest.approx(rows[2][0] - rows[1][0])
        for row in rows:
            assert all(f"{number:.4f}" in said for number in row)
    assert "forgetting" in (directory / "matrix.txt").read_text()


def test_a_finished_chain_runs_nothing_again(
    chain: tuple[Path, list[float], str], capfd: pytest.CaptureFixture[str]
) -> None:
    directory, *_ = chain
    before = {path: path.stat().st_mtime for path in directory.glob("*/*")}
    run_here(directory, *COMMAND)
    assert {path: path.stat().st_mtime for path in directory.glob("*/*")} == before
    assert "stage 2 of 2: chat is already completed" in capfd.readouterr().out


def test_a_finished_stage_with_another_config_or_other_data_is_refused(
    chain: tuple[Path, list[float], str], tmp_path: Path
) -> None:
    directory, *_ = chain
    changed = [part.replace("lr=1e-3", "lr=2e-3") for part in COMMAND]
    with pytest.raises(UserError, match=r"stage chat completed with other settings: lr \(0\.001 then, 0\.002 now\)"):
        run_here(directory, *changed)
    copy = Path(shutil.copytree(directory, tmp_path / "chain", ignore=shutil.ignore_patterns("checkpoints")))
    status = read(copy / "01-japanese/status.json")
    (copy / "01-japanese/status.json").write_text(json.dumps({**status, "data_sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"stage japanese completed with other settings: the content of its data; use"):
        run_here(copy, *COMMAND)


def test_a_dry_run_shows_the_stages_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(tmp_path / "chain", *COMMAND, "dry_run=true", "seed=7")
    shown = capsys.readouterr().out
    assert f"starts from  {DEMO_MODEL}\n" in shown
    assert "starts from  the result of japanese\n" in shown
    assert shown.count(" seed=7 ") == 2
    assert not (tmp_path / "chain").exists()


def test_a_step_that_fails_says_which_and_what_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFailed, match=r"^FAILED in stage x; try again$"):
        launch("stage x", tmp_path / "run", ["foo=1"], "try again")
    assert "foo: unknown key" in capfd.readouterr().err


def test_the_last_word_on_a_key_counts_and_a_group_said_again_forgets_its_keys() -> None:
    said = ["peft=lora", "peft.rank=8", "lr=1", "peft=none", "lr=2", "model.offline=true", "model.source=x"]
    assert last_values(said) == ["peft=none", "lr=2", "model.offline=true", "model.source=x"]
