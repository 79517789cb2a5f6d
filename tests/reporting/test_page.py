"""``task=report``: the page of trials with known metrics, also in a real browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qwen_cl.config.errors import UserError
from qwen_cl.config.saved import save_config
from qwen_cl.config.task.report import ReportConfig
from qwen_cl.reporting.figures import draw_plots, pareto_front
from qwen_cl.reporting.importance import importances
from qwen_cl.reporting.page import render_page
from qwen_cl.reporting.report import report
from qwen_cl.reporting.run_summary import read_trials
from qwen_cl.runs.folder import RunFolder
from tests.conftest import ROOT, Launched, launch
from tests.support.composed_configs import compose_run
from tests.support.invocations import invocation
from tests.support.wandb_server import wandb_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TRIALS: list[tuple[str, str, str, float, float]] = [
    # lr, rank, data, final target loss, increase of English
    ("1e-4", "8", "demo", 3.0, 0.1),
    ("1e-4", "32", "demo", 2.8, 0.2),
    ("3e-4", "8", "demo", 2.5, 0.25),
    ("3e-4", "32", "jsonl", 2.0, 0.5),
    ("1e-3", "8", "jsonl", 1.9, 0.9),
    ("1e-3", "32", "jsonl", 2.2, 1.1),
]
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def write_trial(directory: Path, overrides: list[str], lines: list[dict[str, Any]], **status: Any) -> RunFolder:
    folder = RunFolder(directory)
    (directory / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), directory / ".hydra/overrides.yaml")
    save_config(replace(compose_run(), lr=0.5), folder.config)
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    folder.update_status(**{"state": "COMPLETED", "reason": None, "step": 2, **status})
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sweeps") / "20260101"
    for number, (rate, rank, data, loss, rise) in enumerate(TRIALS):
        lines = [
            {"step": 0, "val/target/loss": 4.0, "retention/english/loss": 1.0},
            {"step": 1, "train/loss": 4.5, "throughput/tokens_per_second": 10.0},
            {"step": 2, "train/loss": 3.5, "throughput/tokens_per_second": 1234.0},
            {"step": 2, "val/target/loss": loss, "retention/english/loss": 1.0 + rise},
        ]
        write_trial(
            place / f"{number:02}",
            ["task.max_steps=2", f"lr={rate}", f"peft.rank={rank}", f"data={data}"],
            lines,
            start=START.isoformat(),
            end=(START + timedelta(seconds=100 + number)).isoformat(),
            peak_memory_gib=1.5,
            data_sha256="abc" if data == "demo" else "def",
            device="CPU",
        )
    samples = [
        {"step": step, "prompt": "<b>何?</b>", "expected": "right", "answer": f"answer & of step {step}"}
        for step in (0, 2)
    ]
    (place / "04/samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples), encoding="utf-8")
    write_trial(
        place / "06",
        ["task.max_steps=2", "lr=1", "peft.rank=8", "data=demo"],
        [],
        state="FAILED",
        reason="it <broke>",
        step=0,
    )
    shutil.copytree(place / "06", place / "06.cut-off-1")
    (place / "07").mkdir()  # a trial that has not started
    return place


@pytest.fixture(scope="module")
def rendered(sweep: Path) -> str:
    return render_page(read_trials(sweep), "a sweep")


class Page(html.parser.HTMLParser):
    """The rows of the tables, and the addresses that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.fetched: list[str] = []
        self.images: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.fetched += [value for name in ("src", "href", "action") if (value := named.get(name))]
        if tag == "img":
            self.images.append(named["alt"] or "")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._in_cell = True
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def test_the_table_has_every_trial_with_its_figures(rendered: str) -> None:
    page = Page(rendered)
    columns, *rows = page.tables[0]
    assert columns == [
        "run", "state", "lr", "peft.rank", "data", "step", "target loss", "at step 0", "forgetting",
        "english loss", "tokens/s", "peak GiB", "seconds", "device-seconds", "reason",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["04", "03", "05", "02", "01", "00", "06"]
    assert rows[0] == [
        "04", "COMPLETED", "1e-3", "8", "jsonl", "2", "1.9000", "4.0000", "+0.9000", "1.9000", "1,234", "1.50",
        "104", "104", "",
    ]  # fmt: skip
    assert rows[-1] == ["06", "FAILED", "1", "8", "demo", "0", *[""] * 8, "it <broke>"]
    (samples,) = [table for table in page.tables if table[0][0] == "prompt"]
    assert samples == [
        ["prompt", "expected", "step 0", "step 2"],
        ["<b>何?</b>", "right", "answer & of step 0", "answer & of step 2"],
    ]
    facts = page.tables[-1]
    assert ["data sha256", "abc", "02, 01, 00"] in facts
    assert ["device", "CPU", "04, 03, 05, 02, 01, 00"] in facts


def test_a_page_asks_for_nothing(rendered: str) -> None:
    page = Page(rendered)
    assert [what[:22] for what in page.fetched] == ["data:image/png;base64,"] * len(page.images)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|http-equiv", rendered)
    assert len(rendered) < 1_000_000


def test_the_pictures_say_in_words_what_they_show(sweep: Path) -> None:
    said = {plot.title: plot.caption for plot in draw_plots(read_trials(sweep))}
    assert said == {
        "Validation loss": "Best: 04, 4.0000 at the start and 1.9000 at the end.",
        "Training loss": "; ".join(f"{name} ends at 3.5000" for name in ("04", "03", "05", "02", "01", "00")),
        "Forgetting: english": "Above 0 the model is worse than before training.",
        "Parallel coordinates": (
            "Each line is a trial; darker lines have a lower target loss. The table has the values."
        ),
        "Parameter importance": (
            "data 0.88 (jsonl is best); lr 0.84 (raise it); peft.rank 0.10 (raise it). "
            "With only 6 trials, high values may be chance."
        ),
        "Target loss by learning rate and rank": "Lowest: 1.9000 at lr 0.001, rank 8.",
        "Learning versus forgetting (lower left is better)": (
            "Pareto front, from the lowest target loss to the least forgetting: 04, 03, 02, 01, 00."
        ),
    }


def test_importance_is_rank_correlation_and_correlation_ratio(sweep: Path) -> None:
    """Compare with scipy's Spearman correlation and with the ratio computed by hand."""
    from scipy.stats import rankdata, spearmanr

    trials = [trial for trial in read_trials(sweep) if trial.completed]
    losses = [trial.loss or 0.0 for trial in trials]
    found = {each.key: each.strength for each in importances(trials, losses)}
    for key in ("lr", "peft.rank"):
        expected = spearmanr([float(trial.overrides[key]) for trial in trials], losses).statistic
        assert found[key] == pytest.approx(abs(expected))
    ranks = dict(zip((trial.name for trial in trials), rankdata(losses)))
    demo, rest = [ranks[name] for name in ("00", "01", "02")], [ranks[name] for name in ("03", "04", "05")]
    between = 3 * (sum(demo) / 3 - 3.5) ** 2 + 3 * (sum(rest) / 3 - 3.5) ** 2
    assert found["data"] == pytest.approx((between / sum((rank - 3.5) ** 2 for rank in ranks.values())) ** 0.5)
    assert importances(trials[:2], losses[:2]) == []


def test_the_front_leaves_out_what_another_beats_in_both(sweep: Path) -> None:
    assert [trial.name for trial in pareto_front(read_trials(sweep))] == ["04", "03", "02", "01", "00"]  # not 05


def test_one_run_is_a_page_too(trained: Launched, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = launch(
        "task=report", f"task.run={trained.folder.directory}", f"task.output={page}", directory=tmp_path / "x"
    )
    assert done.returncode == 0, done.stderr
    assert str(page) in done.stdout
    assert not (tmp_path / "x").exists()
    read = Page(page.read_text(encoding="utf-8"))
    measured = [json.loads(line) for line in trained.folder.metrics_file.read_text().splitlines()]
    last = [line["val/target/loss"] for line in measured if "val/target/loss" in line][-1]
    row = dict(zip(*read.tables[0]))
    assert row["target loss"] == f"{last:.4f}"
    assert row["state"] == "COMPLETED"
    assert len(read.images) == 3


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], "set either task.sweep (a folder of runs) or task.run (the folder of one run)"),
        (
            ["task.sweep=a", "task.run=b"],
            "set either task.sweep (a folder of runs) or task.run (the folder of one run)",
        ),
        (["task.sweep=a", "lr=1"], "lr=1 has no effect: the report only reads the folder; remove it"),
        (["task.sweep=/nowhere"], "task.sweep (/nowhere) is not a folder; name one like outputs/sweeps/TIME"),
        (["task.sweep=conf"], "conf) holds no runs: none of its folders has config.yaml and status.json"),
        (["task.run=conf"], "conf) is not the folder of a training run; for a folder of runs write task.sweep="),
        (["task.sweep=' '"], "task.sweep is empty; name a path, or null"),
        (["task.run=b", "task.publish=true"], "task.publish=true makes a workspace of a sweep's runs"),
    ],
)
def test_a_report_of_nothing_is_refused(said: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make(*said)


def make(*said: str) -> None:
    config = compose_run("task=report", *said)
    assert isinstance(config.task, ReportConfig)
    report(config, config.task, invocation(*said))


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    write_trial(tmp_path / "00", [], [])
    with pytest.raises(UserError, match=r"gone/page.html cannot be written: No such file .*; choose another"):
        make(f"task.sweep={tmp_path}", f"task.output={tmp_path}/gone/page.html")


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    folder = write_trial(tmp_path / "00", [], [])
    folder.status_file.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"00/status\.json is not JSON: Expecting property name"):
        make(f"task.sweep={tmp_path}")
    write_trial(tmp_path / "01", [], []).samples.write_text('{"step": 0}\n', encoding="utf-8")
    shutil.rmtree(folder.directory)
    with pytest.raises(UserError, match=r"01 cannot be read as a run: TypeError.*'prompt', 'expected', and 'answer'"):
        make(f"task.sweep={tmp_path}")


def publish(sweep: Path, directory: Path, *said: str, **environment: str) -> Launched:
    """Run task=report in a child process, as W&B keeps a key as long as its process lives."""
    asked = ["task=report", f"task.sweep={sweep}", f"task.output={directory}/page.html", "task.publish=true", *said]
    return launch(*asked, directory=directory / "x", environment={"WANDB_API_KEY": "0" * 40, **environment})


@pytest.mark.slow
def test_a_workspace_and_a_report_are_made_of_the_group(sweep: Path, tmp_path: Path) -> None:
    """Check the requests of W&B's own client."""
    with wandb_server() as server:
        done = publish(sweep, tmp_path, WANDB_BASE_URL=server.url, NO_PROXY="127.0.0.1")
        assert done.returncode == 0, done.stderr
        for address in (f"{server.url}/me/qwen_cl?nw=view", f"{server.url}/me/qwen_cl/reports/Sweep-20260101--"):
            assert address in done.stdout
        workspace, page = (json.loads(view["spec"]) for view in server.views)
    assert '"20260101"' in json.dumps(workspace["section"]["runSets"])
    panels = {
        panel["viewType"]: panel["config"]
        for section in workspace["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
    }
    assert panels["Parameter Importance"]["targetKey"] == "val/target/loss.last"
    assert [column["accessor"] for column in panels["Parallel Coordinates Plot"]["columns"]] == [
        "config:lr.value",
        "config:peft.value.rank",
        "config:data.value.type",
        "summary:val/target/loss.last",
        "summary:retention/english/loss.last",
    ]
    text = json.dumps(page)
    for panel in ("Parallel coordinates", "lr x rank: target loss", "Target versus english", "Retention: english"):
        assert panel in text


@pytest.mark.slow
def test_a_workspace_that_w_and_b_refuses_is_reported(tmp_path: Path) -> None:
    write_trial(tmp_path / "00", [], [])
    with wandb_server(init=401) as server:
        done = publish(tmp_path, tmp_path, "wandb.entity=me", WANDB_BASE_URL=server.url, NO_PROXY="127.0.0.1")
    assert done.returncode == 1
    assert "W&B refused the workspace or the report: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "page.html").is_file()


@pytest.mark.slow
def test_without_the_extra_or_a_key_nothing_is_published(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "wandb_workspaces.py").write_text("raise ImportError", encoding="utf-8")
    done = publish(sweep, tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "task.publish=true needs wandb-workspaces: pip install 'qwen_cl[workspaces]'"
    )
    done = publish(sweep, tmp_path, WANDB_API_KEY="", NETRC=str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "task.publish=true needs a W&B key; run `wandb login`, or set WANDB_API_KEY"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page was not looked at in a browser")
def test_a_real_browser_shows_it_and_sorts(rendered: str, tmp_path: Path) -> None:
    """Click twice on "target loss": the first table is sorted worst first, with empty cells last."""
    script = """<script>
    var head = Array.from(document.querySelectorAll("th")).find(th => th.textContent === "target loss");
    head.click(); head.click();
    var names = Array.from(head.closest("table").tBodies[0].rows).map(row => row.cells[0].textContent).join(",");
    var loaded = Array.from(document.images).filter(image => image.complete && image.naturalWidth > 500).length;
    document.title = names + " images " + loaded;
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(rendered.replace("</body>", script), encoding="utf-8")
    shown = subprocess.run(
        [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "<title>00,01,02,05,03,04,06 images 7</title>" in shown.stdout
