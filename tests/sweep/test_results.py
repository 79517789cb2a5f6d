"""The view and the results of a sweep, from folders as trials write them."""

from __future__ import annotations

import csv
import io
import json
import re
import types
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from qwen_cl.config.errors import UserError
from qwen_cl.planning.plan import Plan
from qwen_cl.reporting.console import console_for_tables
from qwen_cl.reporting.report import write_report
from qwen_cl.runs.folder import RunFolder
from qwen_cl.sweep.results import best_of, print_results, read_results, write_results
from qwen_cl.sweep.trial import Trial, trial_name, write_json
from qwen_cl.sweep.view import SweepView


def write_trial(directory: Path, number: int, losses: tuple[float, ...], kept: tuple[float, ...], **said: str) -> None:
    """Write the folder of a completed trial, or of a failed one if there are no losses."""
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
    """Write the trials of lr x rank, one of which failed."""
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
    assert best.forgetting == pytest.approx(0.4)
    assert best.tokens_per_second == 300.0
    console = console_for_tables(io.StringIO())
    print_results(results, [("time", "9 s")], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\* +02 +COMPLETED +1e-3 +8 +2\.5000 +\+0\.4000 +3\.0000 +300 +60 +20", text)
    assert re.search(r"^ +01 +COMPLETED +1e-4 +32 +3\.2000 +0\.7000 +\+0\.3000 ", text, re.MULTILINE)
    assert "03-lr_1e-3-rank_32: FAILED, it broke" in text
    assert (
        "best  02-lr_1e-3-rank_8, validation loss 2.5000, 0.7000 (21.9%) below the second best, 01-lr_1e-4-rank_32"
        in text
    )
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
    # Its first training step was logged at 0.5 s.
    line.latest.update(step=5, time=1.5)
    assert line.seconds_left() == pytest.approx((1.5 - 0.5) / 5 * 3)
