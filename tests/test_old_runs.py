"""The folders of tests/old_runs, written by earlier code: they resume, export, evaluate and report."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT, Launched, launch
from tests.support.exporting import run_export
from tests.support.sweeping import sweep

pytestmark = pytest.mark.slow

OLD = ROOT / "tests/old_runs"
WRITTEN_AT = "/tmp/old_runs"
"""The path of the folders when they were written, which their files contain."""
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
"""The results of the code that wrote the folders."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return a copy of all folders, with their paths updated."""
    copy = Path(shutil.copytree(OLD, tmp_path / "old_runs"))
    for path in sorted(copy.rglob("*")):
        if path.suffix in (".json", ".yaml", ".csv") and "context" not in path.parts:
            text = path.read_text(encoding="utf-8")
            if WRITTEN_AT in text:
                path.write_text(text.replace(WRITTEN_AT, str(copy)), encoding="utf-8")
    for manifest in copy.glob("*/checkpoints/*/manifest.json"):
        _seal_again(manifest)
    for identity in copy.glob("sweep/*/identity.json"):
        trial = identity.with_name("trial.json")
        config_hash = hashlib.sha256(identity.read_bytes()).hexdigest()
        trial.write_text(json.dumps({**json.loads(trial.read_text()), "config_hash": config_hash}))
    return copy


def _seal_again(manifest: Path) -> None:
    """Update the files of a manifest, and nothing else."""
    content = json.loads(manifest.read_text())
    for name, saved in content["files"].items():
        data = (manifest.parent / name).read_bytes()
        saved.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest.write_text(json.dumps(content))


def overrides(run: Path) -> list[str]:
    """Read the overrides that the run was started with, as they were typed."""
    said: list[str] = yaml.safe_load((run / ".hydra/overrides.yaml").read_text(encoding="utf-8"))
    return said


def resumed(run: Path, *more: str) -> Launched:
    done = launch(*overrides(run), *more, directory=run, warm=True)
    assert done.returncode == 0, done.stderr
    return done


def losses(run: Path) -> dict[str, dict[str, float]]:
    """Read every loss that was recorded, by step and name."""
    found: dict[str, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        step = found.setdefault(str(record["step"]), {})
        assert not step.keys() & {name for name in record if name.endswith("/loss")}, "recorded twice"
        step.update({name: value for name, value in record.items() if name.endswith("/loss")})
    return found


def check_losses(run: Path) -> None:
    expected = EXPECTED["losses"][run.name]
    found = losses(run)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5), step


def test_an_interrupted_lora_run_resumes_as_if_it_had_not_been(old: Path) -> None:
    run = old / "lora"
    before = json.loads((run / "status.json").read_text())
    assert before["state"] == "PREEMPTED"
    resumed(run)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("COMPLETED", 16)
    assert status["resumed"][-1]["step"] == before["step"]
    check_losses(run)


def test_a_full_run_is_trained_further(old: Path) -> None:
    run = old / "full"
    resumed(run, "task.max_steps=8", "resume.allow=[task.max_steps]")
    assert json.loads((run / "status.json").read_text())["step"] == 8
    check_losses(run)


@pytest.mark.parametrize("name", ["lora", "full", "nemo"])
def test_losses_on_named_sets_are_those_of_then(name: str, old: Path, tmp_path: Path) -> None:
    model = f"model.source={old / name}" if name == "nemo" else f"task.run={old / name}"
    done = launch(
        "task=evaluate",
        model,
        "task.sequence_length=128",
        "cluster.accelerator=cpu",
        f"task.sets={{text: '{old}/data/kept.jsonl', rows: '{old}/data/train.jsonl'}}",
        f"task.output={tmp_path / 'evaluated.json'}",
        directory=tmp_path / "outputs/evaluate",
        warm=True,
    )
    assert done.returncode == 0, done.stderr
    sets = json.loads((tmp_path / "evaluated.json").read_text())["sets"]
    assert {name: found["loss"] for name, found in sets.items()} == pytest.approx(EXPECTED["evaluated"][name], rel=1e-6)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_exports_hold_the_tensors_of_then(name: str, old: Path, tmp_path: Path) -> None:
    run_export(f"task.run={old / name}", f"task.output={tmp_path / 'exported'}")
    exported = load_file(tmp_path / "exported/model.safetensors")
    hashes = {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in exported.items()}
    assert hashes == EXPECTED["exported"][name]


def test_a_full_run_s_checkpoint_is_a_model_to_start_from(old: Path, tmp_path: Path) -> None:
    """Check a checkpoint whose context names functions by their earlier modules."""
    (checkpoint,) = (old / "full/checkpoints").glob("step=*")
    assert "_target_: qwen_cl." in (checkpoint / "context/model.yaml").read_text()
    done = launch(
        "task=evaluate",
        f"model.source={checkpoint}",
        "task.sequence_length=128",
        "cluster.accelerator=cpu",
        f"task.sets={{text: '{old}/data/kept.jsonl'}}",
        f"task.output={tmp_path / 'evaluated.json'}",
        directory=tmp_path / "outputs/evaluate",
        warm=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluated.json").read_text())["sets"]["text"]["loss"]
    assert found == pytest.approx(EXPECTED["evaluated"]["full"]["text"], rel=1e-6)


def test_a_finished_sweep_is_found_finished_and_its_page_made_again(old: Path) -> None:
    first, second = sorted((old / "sweep").glob("*/trial.json"))
    values = [json.loads(path.read_text())["differing"]["replay.share"] for path in (first, second)]
    said = [text for text in overrides(first.parent) if not text.startswith("replay.share=")]
    before = {path: path.read_bytes() for path in (old / "sweep").glob("*/metrics.jsonl")}
    table = [
        {_under_todays_names(name): _under_todays_names(value) for name, value in row.items()}
        for row in _table(old / "sweep")
    ]
    (old / "sweep/sweep.csv").unlink()
    code, stdout, stderr = sweep(old / "sweep", *said, f"replay.share={','.join(values)}")
    assert code == 0, stderr
    assert "started" not in stdout, stdout
    assert {path: path.read_bytes() for path in (old / "sweep").glob("*/metrics.jsonl")} == before
    assert _table(old / "sweep") == table
    page = (old / "sweep/report.html").read_text(encoding="utf-8")
    assert all(f"{float(row['val_loss']):.4f}" in page for row in table)


RENAMED = {
    "forgotten": "forgetting",
    "replay.share": "replay.ratio",
    "replay.sets": "replay.datasets",
    "retention.sets": "retention.eval_sets",
}
"""The sweep's keys, as its table names them."""


def _under_todays_names(text: str) -> str:
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return text


def _table(directory: Path) -> list[dict[str, str]]:
    with (directory / "sweep.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_report_of_one_run(old: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = launch(
        "task=report", f"task.run={old / 'lora'}", f"task.output={page}", directory=tmp_path / "outputs/report"
    )
    assert done.returncode == 0, done.stderr
    measured = [values["val/target/loss"] for values in losses(old / "lora").values() if "val/target/loss" in values]
    assert f"{measured[-1]:.4f}" in page.read_text(encoding="utf-8")
