"""Keys under their earlier names: on the command line, in YAML files, in sweeps; what old folders hold is in
test_old_runs.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from qwen_cl.config import renamed_keys
from qwen_cl.config.errors import UserError
from qwen_cl.config.renamed_keys import KEYS, rename_mapping, rename_overrides
from qwen_cl.config.store import register_schemas
from tests.conftest import ROOT, launch
from tests.support.sweeping import sweep

GIVEN = "{old} and {new} are both given, the earlier and today's name of one key; give {new} alone"


@pytest.fixture(autouse=True)
def nothing_reported() -> None:
    renamed_keys.reported.clear()


def test_every_new_name_is_a_key_and_no_earlier_one_is() -> None:
    register_schemas()
    known: set[str] = set()
    for choices in CHOICES:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            known |= _keys(yaml.safe_load(_yaml(choices)))
    top = {key for key in KEYS.values() if not key.startswith("task.stages.")}
    assert top <= known
    assert not known & KEYS.keys()


CHOICES = (
    ["replay=files", "retention=files", "data=text"],
    ["replay=demo"],
)


def _yaml(choices: list[str]) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(compose("config", choices))


def _keys(content: object, owner: str = "") -> set[str]:
    if not isinstance(content, dict):
        return {owner}
    return {owner}.union(*(_keys(value, f"{owner}.{name}".lstrip(".")) for name, value in content.items()))


@pytest.mark.parametrize(
    ("typed", "renamed", "line"),
    [
        ("replay.share=0.2", "replay.ratio=0.2", "replay.share is now replay.ratio"),
        ("++replay.share=0.1,0.2", "++replay.ratio=0.1,0.2", "replay.share is now replay.ratio"),
        ("replay.sets={share: a.jsonl}", "replay.datasets={share: a.jsonl}", "replay.sets is now replay.datasets"),
        ("+replay.sets.b=b.txt", "+replay.datasets.b=b.txt", "replay.sets.b is now replay.datasets.b"),
        (
            "task.loss_on=answers,all",
            "task.loss_on=assistant,all",
            "task.loss_on=answers is now task.loss_on=assistant",
        ),
        ("speed=plain,fast", "speed=off,fast", "speed=plain is now speed=off"),
        (
            "resume.allow_changes=[lr,replay.share]",
            "resume.allow_changes=[lr,replay.ratio]",
            "replay.share is now replay.ratio",
        ),
        (
            "hydra.sweeper.objectives=[val,val_loss]",
            "hydra.sweeper.objectives=[val_loss,val_loss]",
            "hydra.sweeper.objectives=val is now hydra.sweeper.objectives=val_loss",
        ),
        (
            "task.stages=[{name: teaches, teaches: [a]}]",
            "task.stages=[{name: teaches, eval_sets: [a]}]",
            "task.stages[].teaches is now task.stages[].eval_sets",
        ),
        ("task.prompt=replay.share=1", "task.prompt=replay.share=1", ""),
        ("name=replay.share", "name=replay.share", ""),
    ],
)
def test_an_override(typed: str, renamed: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rename_overrides([typed]) == [renamed]
    assert capsys.readouterr().err.strip() == line


def test_a_name_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        rename_overrides(["replay.share=0.2", "lr=1"])
        rename_mapping({"replay": {"share": 0.1}})
    assert capsys.readouterr().err == "replay.share is now replay.ratio\n"


def test_both_names_are_refused() -> None:
    message = GIVEN.format(old="replay.share", new="replay.ratio")
    for overrides in (["replay.share=0.2", "replay.ratio=0.2"], ["replay.ratio=0.2", "+replay.share=0.2"]):
        with pytest.raises(UserError) as refused:
            rename_overrides(overrides)
        assert str(refused.value) == message
    with pytest.raises(UserError) as refused:
        rename_mapping({"share": 0.1, "ratio": 0.1}, "replay")
    assert str(refused.value) == message


EXPERIMENT = """# @package _global_
defaults:
  - override /replay: files
  - override /speed: plain
replay:
  share: 0.3
  sets: {old: old.jsonl}
task:
  loss_on: last_answer
resume:
  allow: [model.locked]
"""


def test_an_experiment_s_file(tmp_path: Path) -> None:
    """And a file of a group's own, through the command that a user types."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(EXPERIMENT)
    (tmp_path / "retention").mkdir()
    (tmp_path / "retention/own.yaml").write_text("defaults: [retention_schema, _self_]\nsets: {a: a.jsonl}\n")
    done = composed("--config-dir", str(tmp_path), "experiment=mine", "retention=own")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["replay"] == {"ratio": 0.3, "datasets": {"old": "old.jsonl"}, "weights": {}}
    assert config["retention"] == {"eval_sets": {"a": "a.jsonl"}}
    assert config["task"]["loss_on"] == "last_assistant"
    assert config["resume"] == {"allow_changes": ["model.require_pinned_revision"]}
    assert config["speed"]["compile"] == "never"
    assert sorted(", ".join(done.stderr.splitlines()).split(", ")) == [
        "model.locked is now model.require_pinned_revision",
        "replay.sets is now replay.datasets",
        "replay.share is now replay.ratio",
        "resume.allow is now resume.allow_changes",
        "retention.sets is now retention.eval_sets",
        "speed=plain is now speed=off",
        "task.loss_on=last_answer is now task.loss_on=last_assistant",
    ]


@pytest.mark.parametrize("word", ["off", "'off'", "plain"])
def test_speed_off_in_a_defaults_list(word: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = f"# @package _global_\ndefaults: [{{override /speed: {word}}}]\n"
    (tmp_path / "experiment/mine.yaml").write_text(text)
    done = composed("--config-dir", str(tmp_path), "experiment=mine")
    assert yaml.safe_load(done.stdout)["speed"]["compile"] == "never", done.stderr


def test_none_is_another_name_of_full() -> None:
    full, none = (composed(f"peft={name}") for name in ("full", "none"))
    assert full.stdout == none.stdout
    assert (full.stderr, none.stderr) == ("", "")


def test_a_command_line_gives_what_a_file_says_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(EXPERIMENT)
    done = composed("--config-dir", str(tmp_path), "experiment=mine", "replay.ratio=0.5")
    assert yaml.safe_load(done.stdout)["replay"]["ratio"] == 0.5


def composed(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), "--cfg", "job", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_command_with_both_names_is_refused(tmp_path: Path) -> None:
    done = launch("replay=demo", "replay.share=0.2", "replay.ratio=0.3", directory=tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [GIVEN.format(old="replay.share", new="replay.ratio")]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_over_an_earlier_name(tmp_path: Path) -> None:
    code, stdout, stderr = sweep(
        tmp_path / "sweep", "dry_run=true", "cluster.accelerator=cpu", "replay=demo", "replay.share=0.1,0.2"
    )
    assert code == 0, stderr
    assert stderr.splitlines() == ["replay.share is now replay.ratio"]
    assert all(f"ratio_{value}" in stdout for value in ("0.1", "0.2"))
