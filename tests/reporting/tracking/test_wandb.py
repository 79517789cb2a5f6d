"""W&B with the real client: the identity of a run, and runs that complete and record the reason when W&B fails."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.reporting.console import wandb_notice
from qwen_cl.reporting.tracking.identity import identify, sync_command
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import RunStatus, WandbRecord
from tests.conftest import ROOT, Launched
from tests.support.composed_configs import compose_run
from tests.support.fault_table import Row
from tests.support.wandb_server import wandb_server

KEY = "0123456789" * 4
TRIALS = ("lr=1", "lr=2")
CANARY = "hf_CanaryThatMustNotBeWritten"
LOG = """
import os, signal, sys
import psutil
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from qwen_cl.config.store import register_schemas
from qwen_cl.reporting.tracking.start import wandb_logger
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import RunStatus, WandbRecord

register_schemas()
root, folder, fault, *overrides = sys.argv[1:]
with initialize_config_dir(root + "/conf", version_base="1.3"):
    config = OmegaConf.to_object(compose("config", overrides))
with wandb_logger(config, RunFolder(folder)) as logger:
    for step, loss in enumerate([3.0, 1.0, 2.0]):
        if logger is not None:
            logger.log({"train/loss": loss, "optim/lr": 0.1, "tokens": 10 * step}, step)
    for process in psutil.Process().children(recursive=True):
        if fault:
            process.send_signal(getattr(signal, fault))
    if fault:
        logger.log({"train/loss": 9.0, "tokens": 40}, 4)
"""
WITHOUT_PROXY = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
"""The environment without proxies, which would hide a server on this machine."""


def log(
    directory: Path,
    *overrides: str,
    server: str = "http://127.0.0.1:9",
    fault: str = "",
    largest_file: int | None = None,
    **environment: str,
) -> WandbRecord:
    """Log three records in a process that must succeed; return the W&B part of its status."""
    directory.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", LOG, str(ROOT), str(directory), fault, *overrides],
        cwd=ROOT,
        env={
            **WITHOUT_PROXY,
            "WANDB_API_KEY": KEY,
            "HF_TOKEN": CANARY,
            "WANDB_BASE_URL": server,
            "WANDB_INIT_TIMEOUT": "2",
            "WANDB_FINISH_TIMEOUT": "2",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=None if largest_file is None else lambda: _limit_files(largest_file),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = b"".join(path.read_bytes() for path in directory.parent.rglob("*") if path.is_file())
    assert KEY.encode() not in written
    assert CANARY.encode() not in written
    return RunFolder(directory).status().wandb


def _limit_files(size: int) -> None:
    """Limit files to ``size`` bytes, so that writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_back(record: Path) -> dict[str, list[Any]]:
    """Return the records of a W&B run's folder by kind, read with W&B's own reader."""
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[Any]] = {}
    for line in map(json.loads, shown.stdout.splitlines()):
        found.setdefault(line["type"], []).append(line)
    return found


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, WandbRecord]]:
    """Start a run per kind of W&B failure, all at once, as they mostly wait; return their folders and statuses."""
    place = tmp_path_factory.mktemp("failures")
    slow = {"WANDB_INIT_TIMEOUT": "60"}  # for the runs that start
    with (
        wandb_server(init=503) as broken,
        wandb_server(init=401) as wrong_key,
        wandb_server(init=None) as hanging,
        wandb_server(stream=500) as fails_later,
        wandb_server(stream=401) as withdrawn_key,
        wandb_server() as whole,
        ThreadPoolExecutor(6) as pool,
    ):
        cases: dict[str, dict[str, Any]] = {
            "not there": {},
            "malformed key": {"server": whole.url, "WANDB_API_KEY": "short"},
            "broken": {"server": broken.url},
            "wrong key": {"server": wrong_key.url},
            "hanging": {"server": hanging.url},
            "fails later": {"server": fails_later.url, **slow},
            "withdrawn key": {"server": withdrawn_key.url, **slow, "WANDB_FINISH_TIMEOUT": "30"},
            "killed": {"server": whole.url, "fault": "SIGKILL", **slow},
            "stopped": {"server": whole.url, "fault": "SIGSTOP", **slow},
            "full disk": {"largest_file": 2000},
        }
        sweep = place / "sweeps/20260101"
        for trial in TRIALS:
            cases[trial] = {"QWEN_CL_SWEEP": str(sweep), "QWEN_CL_TRIAL_NAME": trial}
        folders = {name: place / f"{number}/run" for number, name in enumerate(cases)}
        folders |= {trial: sweep / trial for trial in TRIALS}
        running = {name: pool.submit(log, folders[name], **how) for name, how in cases.items()}
        return {name: (folders[name], job.result()) for name, job in running.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("not there", r"127\.0\.0\.1:9 does not answer \(Connection refused\)"),
        ("malformed key", r"no API key"),
        ("broken", r"CommError: .*503.*"),
        ("wrong key", r"CommError: .*401.*"),
        ("hanging", r"CommError: .*"),
    ],
)
def test_a_server_that_does_not_start_the_run_leaves_it_offline(
    failures: dict[str, tuple[Path, WandbRecord]], case: str, reason: str, row: Row
) -> None:
    """Check that there is one W&B folder, the one that the sync command names, with all that was logged."""
    folder, status = failures[case]
    assert status.mode == "offline"
    assert re.fullmatch(reason, str(status.reason))
    (record,) = (path for path in (folder / "wandb").glob("*run-*") if path.is_dir() and not path.is_symlink())
    assert status.sync == f"wandb sync {record}"
    assert losses_of(record) == [3.0, 1.0, 2.0]
    row("W&B is unreachable or refuses when a run starts", "the run logs offline, with a notice", "nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("fails later", r"TimeoutError: Timed out finishing run\."),
        ("withdrawn key", "failed to upload: 401 Unauthorized"),
        ("killed", "ConnectionResetError|HandleAbandonedError"),  # whichever call fails first
        ("stopped", "its service did not end within 12 s"),
    ],
)
def test_what_fails_during_the_run_is_reported_with_the_way_to_upload_it(
    failures: dict[str, tuple[Path, WandbRecord]], case: str, reason: str, row: Row
) -> None:
    _, status = failures[case]
    assert status.mode == "online"
    assert re.match(reason, str(status.reason))
    assert status.sync == f"wandb sync --include-online {status.directory}"
    notice = wandb_notice(RunStatus(wandb=status))
    assert notice == f"W&B: {status.reason}, the upload is incomplete; upload with: {status.sync}"
    if case in ("fails later", "withdrawn key"):  # the service kept running, and all is on disk
        assert losses_of(Path(str(status.directory))) == [3.0, 1.0, 2.0]
    row("W&B fails during the run", "the run continues, and prints how to upload the rest", "nothing")


@pytest.mark.slow
def test_a_full_disk_ends_nothing(failures: dict[str, tuple[Path, WandbRecord]]) -> None:
    folder, status = failures["full disk"]
    files = [
        path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    ]  # links lead to a log of all runs
    assert max(path.stat().st_size for path in files) <= 2000
    assert status.id


def test_a_run_without_any_w_and_b_says_where_its_figures_are() -> None:
    status = RunStatus(wandb=WandbRecord(mode="disabled", reason="OSError: No space left on device"))
    told = "W&B: OSError: No space left on device; nothing is logged to W&B, all metrics are in metrics.jsonl"
    assert wandb_notice(status) == told
    assert wandb_notice(RunStatus(wandb=WandbRecord(mode="online", url="https://…"))) is None


def losses_of(record: Path) -> list[float]:
    return [line["history"]["item"]["train/loss"] for line in read_back(record)["history"]]


@pytest.mark.slow
def test_trials_are_a_group_in_one_folder(failures: dict[str, tuple[Path, WandbRecord]]) -> None:
    """Check that trials are named by their differing values, and that one command uploads them all."""
    statuses = [failures[trial][1] for trial in TRIALS]
    records = [Path(str(status.directory)) for status in statuses]
    sweep = failures[TRIALS[0]][0].parent
    assert {record.parent for record in records} == {sweep / "wandb"}
    assert len({status.id for status in statuses}) == 2
    for record, name in zip(records, TRIALS):
        (run,) = [line["run"] for line in read_back(record)["run"]]
        assert (run["display_name"], run["run_group"], run["job_type"]) == (name, "20260101", "finetune")
    assert sync_command(sweep) == f"wandb sync {sweep}/wandb/offline-run-*"
    assert sync_command(failures["not there"][0].parent) is None
    shown = subprocess.run(
        f"{sys.executable} -m {sync_command(sweep)} --dry-run", shell=True, capture_output=True, text=True, check=True
    )
    assert all(str(record) in shown.stdout + shown.stderr for record in records)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_id(failures: dict[str, tuple[Path, WandbRecord]], tmp_path: Path) -> None:
    folder, status = failures["not there"]
    assert identify(compose_run(), RunFolder(folder)).id == status.id
    assert identify(compose_run(), RunFolder(tmp_path)).id != status.id


def test_what_is_logged_of_the_config() -> None:
    config = compose_run(
        "cluster=slurm", "cluster.account=a", "cluster.partition=p", "cluster.setup='export T=hunter2'"
    )
    told = identify(config, RunFolder("/nowhere"))
    assert "hunter2" not in str(told.config)
    assert told.config["cluster"]["partition"] == "p"
    assert (told.name, told.group, told.job_type) == ("finetune-lora", None, "finetune")
    named = compose_run("model=hub", "model.source=hf://org/tiny-1b@main", "name=mine", "wandb.tags=[a,a]")
    assert identify(named, RunFolder("/nowhere")).name == "mine"
    assert identify(named, RunFolder("/nowhere")).tags == ["tiny-1b", "lora", "demo", "a"]


def test_the_record_of_a_run_has_its_facts_and_its_metrics_by_kind(trained: Launched) -> None:
    status = trained.folder.status()
    records = read_back(Path(str(status.wandb.directory)))
    (run,) = [line["run"] for line in records["run"]]
    facts = run["config"]["update"]["facts"]
    assert facts["data_sha256"] == status.data_sha256
    assert facts["versions"]["megatron-core"] == "0.15.3"
    assert facts["git_commit"] == status.git_commit
    assert run["config"]["update"]["peft"]["rank"] == 32
    assert run["tags"] == ["tiny", "lora", "demo"]
    assert (run["display_name"], run["job_type"]) == ("finetune-lora", "finetune")

    lines = [json.loads(line) for line in trained.folder.metrics_file.read_text().splitlines()]
    logged = {line["history"]["step"].get("num", 0): line["history"]["item"] for line in records["history"]}
    for line in lines:
        figures = {name: value for name, value in line.items() if name not in ("step", "time")}
        assert {name: logged[line["step"]][name] for name in figures} == pytest.approx(figures)
    assert logged[0]["tokens"] == 0
    table = Path(str(status.wandb.directory)) / "files" / logged[40]["samples.path"]
    asked = [json.loads(line) for line in trained.folder.samples.read_text().splitlines()]
    assert json.loads(table.read_text()) == {
        "columns": ["prompt", "expected", "step 0", "step 40"],
        "data": [
            [before["prompt"], before["expected"], before["answer"], after["answer"]]
            for before, after in zip(asked[:3], asked[3:])
        ],
    }

    artifacts = {line["artifact"]["name"]: line["artifact"] for line in records["artifact"]}
    adapter = artifacts[f"adapter-{status.wandb.id}"]
    assert adapter["type"] == "model"
    assert {entry["ref"] for entry in adapter["manifest"]["contents"]} == {
        path.as_uri() for path in trained.folder.adapter.iterdir()
    }
    origin = json.loads(adapter["metadata"])
    assert origin["model_fingerprint"] == status.model_fingerprint
    assert (origin["data_sha256"], origin["step"]) == (status.data_sha256, 40)

    defined = {line["metric"]["name"]: line["metric"] for line in records["metric"]}
    assert {name.split("/")[0] for name in defined} == {
        "train", "val", "retention", "throughput", "memory", "optim", "tokens",
    }  # fmt: skip
    for name in ("train/loss", "val/target/loss", "retention/english/bits_per_byte"):
        assert defined[name]["step_metric"] == "tokens"
        assert defined[name]["summary"] == {"last": True, "min": True}
    assert defined["optim/lr"]["summary"] == {"last": True}
    summary = {name: value for line in records["summary"] for name, value in line["summary"]["update"].items()}
    losses = [line["val/target/loss"] for line in lines if "val/target/loss" in line]
    assert summary["val/target/loss"] == {"last": losses[-1], "min": min(losses)}


@pytest.mark.slow
@pytest.mark.parametrize("can_rewind", [True, False])
def test_a_resumed_run_is_rewound_to_its_checkpoint_there(can_rewind: bool, tmp_path: Path) -> None:
    """Resume under the same id if the server cannot rewind."""
    folder = RunFolder(tmp_path / "run")
    folder.directory.mkdir()
    before = WandbRecord(id="abcde12345", mode="online", url="http://there/runs/abcde12345")
    folder.update_status(step=20, resume_from="checkpoints/step=20", wandb=before)
    with wandb_server(can_rewind=can_rewind) as server:
        status = log(folder.directory, server=server.url, WANDB_INIT_TIMEOUT="60", WANDB_FINISH_TIMEOUT="30")
    assert [(asked["runName"], asked["metricName"], asked["metricValue"]) for asked in server.rewound] == [
        ("abcde12345", "_step", 20)
    ]
    assert (status.id, status.mode, status.reason) == ("abcde12345", "online", None)
    assert {asked["name"] for asked in server.started} <= {"abcde12345"}
