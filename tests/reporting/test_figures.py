"""The plots and tables of known metrics, and of the demo of continual learning."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from qwen_cl.config.run import RunConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.config.task.continual import ContinualConfig, StageConfig
from qwen_cl.continual.comparison import write_comparison
from qwen_cl.continual.run_stages import continual
from qwen_cl.continual.stages import Stage
from qwen_cl.reporting.forgetting import draw_comparison, draw_report
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.metrics import Curve, read_curves
from tests.conftest import ROOT
from tests.support.invocations import invocation

RECORDS: list[dict[str, Any]] = [
    {
        "step": 0,
        "retention/english/loss": 1.0,
        "retention/english/bits_per_byte": 0.5,
        "val/target/loss": 4.0,
        "val/target/bits_per_byte": 2.0,
        "retention/code/loss": 3.0,
    },
    {"step": 1, "train/loss": 9.0, "optim/lr": 0.1},
    {
        "step": 5,
        "retention/english/loss": 1.5,
        "retention/english/bits_per_byte": 0.75,
        "val/target/loss": 3.0,
        "val/target/bits_per_byte": 1.5,
        "retention/code/loss": 2.5,
    },
]
TARGET_ALONE = [{"step": step, "val/target/loss": loss} for step, loss in ((0, 4.0), (5, 3.0))]


def size_of(picture: Path) -> tuple[int, int]:
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_curves_have_the_target_first_and_each_its_unit() -> None:
    assert read_curves(RECORDS) == [
        Curve("val/target", [0, 5], [2.0, 1.5], "bits_per_byte"),
        Curve("english", [0, 5], [0.5, 0.75], "bits_per_byte"),
        Curve("code", [0, 5], [3.0, 2.5], "loss"),  # a set without text
    ]
    assert [curve.change for curve in read_curves(RECORDS)] == [-0.5, 0.25, -0.5]
    assert read_curves(RECORDS, "loss") == [
        Curve("val/target", [0, 5], [4.0, 3.0], "loss"),
        Curve("english", [0, 5], [1.0, 1.5], "loss"),
        Curve("code", [0, 5], [3.0, 2.5], "loss"),
    ]
    assert read_curves(RECORDS[1:2]) == []


@pytest.mark.parametrize("records", [RECORDS, TARGET_ALONE, RECORDS[:1]], ids=["both", "target alone", "step 0"])
def test_a_run_is_drawn_whatever_it_measured(records: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_report(records, "a run", tmp_path / "report.png")
    width, height = size_of(tmp_path / "report.png")
    assert width > 2 * height > 800
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_where_nothing_was_measured_nothing_is_drawn(tmp_path: Path) -> None:
    draw_report(RECORDS[1:2], "a run", tmp_path / "report.png")
    draw_comparison({}, "a chain", tmp_path / "report.png")
    draw_comparison({"one": []}, "a chain", tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


def stage(directory: Path, number: int, name: str, records: list[dict[str, Any]]) -> Stage:
    folder = RunFolder(directory / f"{number:02}-{name}")
    folder.directory.mkdir()
    folder.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    said = StageConfig(name=name, init_from=None, overrides=[], eval_sets=[])
    # Its config and plan are not read.
    return Stage(number, said, None, folder, [], cast(Any, None), cast(Any, None))


def test_stages_are_compared_by_what_each_measured_itself(tmp_path: Path) -> None:
    stages = [
        stage(tmp_path, 1, "full", RECORDS),
        stage(tmp_path, 2, "alone", TARGET_ALONE),
        stage(tmp_path, 3, "unmeasured", RECORDS[1:2]),
    ]
    said = io.StringIO()
    write_comparison(stages, tmp_path, Console(file=said, width=80))
    lines = [" ".join(line.split()) for line in said.getvalue().splitlines() if line.strip()]
    assert lines == [
        "stage target english code",
        "full 2.000 -> 1.500 (-0.500) 0.500 -> 0.750 (+0.250) 3.000 -> 2.500 (-0.500)",
        "alone 4.000 -> 3.000 (-1.000) - -",
        "unmeasured - - -",
        "Bits per byte, or loss without text, before and after each stage; lower is better.",
    ]
    changes = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert [(change["stage"], change["set"], change["unit"], change["change"]) for change in changes] == [
        ("full", "target", "bits_per_byte", -0.5),
        ("full", "english", "bits_per_byte", 0.25),
        ("full", "code", "loss", -0.5),
        ("alone", "target", "loss", -1.0),
    ]
    width, height = size_of(tmp_path / "report.png")
    assert width > 3 * height > 1200


def test_stages_that_measured_nothing_are_compared_without_a_picture(tmp_path: Path) -> None:
    said = io.StringIO()
    write_comparison([stage(tmp_path, 1, "only", RECORDS[1:2])], tmp_path, Console(file=said, width=80))
    assert json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8")) == []
    assert not (tmp_path / "report.png").exists()
    assert "only" in said.getvalue()


@pytest.mark.slow
def test_the_demonstration_is_three_ways_to_learn_from_one_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_schemas()
    said = ["experiment=demo_continual", "dry_run=true", "seed=7", "cluster.accelerator=cpu"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = cast(RunConfig, OmegaConf.to_object(compose("config", said)))
        assert isinstance(config.task, ContinualConfig)
        continual(config, config.task, invocation(*said, directory=tmp_path / "chain"))
    shown = capsys.readouterr().out
    assert [line.split()[-1] for line in shown.splitlines() if line.split()[:1] == ["stage"]] == [
        "full",
        "full-replay",
        "lora",
    ]
    assert shown.count(f"starts from  {ROOT / 'qwen_cl/demo/model'}\n") == 3
    assert shown.count(" seed=7 ") == 3
    for override in ("peft=full lr=1e-3 replay=none", "peft=full lr=1e-3 replay=demo", "peft=lora lr=5e-4 replay=none"):
        assert override in shown
    assert not (tmp_path / "chain").exists()
