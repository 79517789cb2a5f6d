"""The batch script as a shell and sbatch read it, and what becomes of a run by Slurm's word. No Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.config.cluster import SlurmConfig
from qwen_cl.config.errors import UserError
from qwen_cl.launch.slurm.commands import Job
from qwen_cl.launch.slurm.job_status import record_job_state
from qwen_cl.launch.slurm.script import render_script, submitting_environment
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State
from tests.conftest import ROOT, launch
from tests.support.composed_configs import compose_run

SLURM = "cluster=slurm"


def render(*overrides: str, folders: tuple[str, ...] = ("/runs/x/a",), sweep: str | None = None) -> str:
    config = compose_run(SLURM, *overrides)
    assert isinstance(config.cluster, SlurmConfig)
    return render_script(config.cluster, config, list(map(RunFolder, folders)), None if sweep is None else Path(sweep))


def flags(script: str) -> dict[str, str]:
    """Return the options as sbatch reads them."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    (words,) = zip(*(shlex.split(line) for line in lines))
    return {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)}


def executed(script: str, directory: Path, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the arguments and environment of each program that the script starts, as stand-ins recorded them."""
    for name in ("python", "srun"):
        program = directory / name
        program.write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$@" ENV >>{directory}/calls; env -0 >>{directory}/calls; '
            f'printf "END\\0" >>{directory}/calls; echo {name} ran\n'
        )
        program.chmod(0o755)
    inherited = {"PATH": f"{directory}:{os.environ['PATH']}", "SLURM_CPUS_ON_NODE": "9", **(environment or {})}
    done = subprocess.run(
        ["bash", "-c", script], env=inherited, check=True, cwd=directory, capture_output=True, text=True
    )
    assert "of-a-file" not in done.stdout + done.stderr  # nothing traces the script's lines
    calls = (directory / "calls").read_text().split("END\0")[:-1]
    found = []
    for call in calls:
        words, _, variables = call.partition("ENV\0")
        pairs = (pair.partition("=") for pair in variables.split("\0") if pair)
        found.append({"words": words.split("\0")[:-1], "env": {name: value for name, _, value in pairs}})
    return found


def test_sbatch_is_given_what_the_config_says() -> None:
    script = render(
        *("cluster.account=us", "cluster.partition=gpus", "cluster.qos=high", "cluster.time=1-02:00:00"),
        *("cluster.nodes=2", "cluster.devices=8", "cluster.grace_seconds=120", "task.global_batch_size=64"),
        "cluster.options={mem: 64G, exclusive: '', comment: \"it's mine\"}",
    )
    assert flags(script) == {
        "job-name": "qwen_cl-x-a",
        "account": "us",
        "partition": "gpus",
        "qos": "high",
        "time": "1-02:00:00",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "signal": "USR1@120",
        "requeue": "",
        "output": "/runs/x/a/run.log",
        "open-mode": "append",
        "mem": "64G",
        "exclusive": "",
        "comment": "it's mine",
    }


def test_a_partition_without_gpus_and_a_job_that_stays_out_of_the_queue() -> None:
    found = flags(render("cluster.accelerator=cpu", "cluster.max_requeues=0", "cluster.grace_seconds=0"))
    assert not {"gpus-per-node", "requeue", "signal", "account", "partition", "qos"} & set(found)
    assert "no-requeue" in found


def test_the_script_starts_the_workers_where_they_find_each_other(tmp_path: Path) -> None:
    run = tmp_path / "a run's/50% folder"
    run.mkdir(parents=True)
    setup = f"export PATH={tmp_path}:$PATH KEY=$(cat {tmp_path}/key)"
    script = render("cluster.accelerator=cpu", "cluster.devices=2", f'cluster.setup="{setup}"', folders=(str(run),))
    assert flags(script)["output"] == str(run / "run.log").replace("%", "%%")
    (tmp_path / "key").write_text("of-a-file")
    start, resume, workers, end = executed(script, tmp_path, {"PYTHONPATH": "/before"})
    assert start["words"] == ["python", "-m", "qwen_cl.launch.slurm.job_hooks", "start", str(run)]
    assert resume["words"] == ["python", "-m", "qwen_cl.runs.resume", str(run)]
    options = ["--export=ALL", "--kill-on-bad-exit=1"]
    step = ["python", "-m", "qwen_cl.launch.slurm.srun_supervisor", str(run)]
    assert workers["words"] == [*step, "srun", *options, "python", "-m", "qwen_cl.training.worker", str(run)]
    assert end["words"] == ["python", "-m", "qwen_cl.launch.slurm.job_hooks", "end", str(run), "0"]
    told = workers["env"]
    assert told["PYTHONPATH"] == f"{ROOT}:/before"
    assert (told["OMP_NUM_THREADS"], told["CUDA_VISIBLE_DEVICES"], told["KEY"]) == ("4", "", "of-a-file")
    assert "of-a-file" not in script


def test_the_trials_of_an_array_each_have_their_folder_and_log(tmp_path: Path) -> None:
    folders = tuple(str(tmp_path / "my sweep" / name) for name in ("00-lr_1", "01-lr_2"))
    for folder in folders:
        Path(folder).mkdir(parents=True)
    sweep = str(tmp_path / "my sweep")
    script = render(f"cluster.setup='export PATH={tmp_path}:$PATH'", folders=folders, sweep=sweep)
    assert flags(script)["array"] == "0-1"
    calls = executed(script, tmp_path, {"SLURM_ARRAY_TASK_ID": "1"})
    assert calls[2]["words"][-2:] == ["qwen_cl.training.worker", folders[1]]
    told = calls[2]["env"]
    assert (told["QWEN_CL_SWEEP"], told["QWEN_CL_TRIAL_NAME"]) == (sweep, "01-lr_2")
    assert (Path(folders[1]) / "run.log").read_text() == "python ran\n" * 4


def test_a_container_has_what_the_run_reads_and_writes() -> None:
    script = render(
        "cluster.container_image='nvcr.io#nvidia/nemo:25.07'", "cluster.container_mounts=['/data:/data:ro']"
    )
    (line,) = [line for line in script.splitlines() if " srun " in line]
    words = dict(word.removeprefix("--").partition("=")[::2] for word in shlex.split(line) if word.startswith("--"))
    assert words["container-image"] == "nvcr.io#nvidia/nemo:25.07"
    assert words["container-workdir"] == str(ROOT)
    mounts = words["container-mounts"].split(",")
    assert {f"{ROOT}:{ROOT}", "/runs/x/a:/runs/x/a", "/data:/data:ro"} <= set(mounts)
    assert "python -m qwen_cl.training.worker" in line  # the image's own


def test_keys_are_inherited_but_for_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SBATCH_TIMELIMIT", "SBATCH_QOS", "SLURM_JOB_ID", "MASTER_PORT"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    config = compose_run(SLURM, "cluster.qos=high")
    assert isinstance(config.cluster, SlurmConfig)
    passed = submitting_environment(config.cluster)
    assert {name: value for name, value in passed.items() if value == "canary"} == {"WANDB_API_KEY": "canary"}
    assert passed["SLURM_CONF"] == "/etc/slurm.conf"
    assert "canary" not in render()


@pytest.mark.slow
def test_without_slurm_the_command_says_so(tmp_path: Path) -> None:
    done = launch(SLURM, "cluster.accelerator=cpu", directory=tmp_path / "run", environment={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert (
        "cluster=slurm needs sbatch, which is not installed here; run this command on a machine that submits"
        in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "job", "ended", "reason", "lost"),
    [
        (
            State.SUBMITTED,
            Job("7", "CANCELLED", "BeginTime"),
            State.PREEMPTED,
            "job 7: CANCELLED, before it started",
            False,
        ),
        (
            State.SUBMITTED,
            Job("7", "FAILED", "NonZeroExitCode"),
            State.FAILED,
            "job 7: FAILED (NonZeroExitCode), before the run started",
            True,
        ),
        (State.SUBMITTED, None, State.FAILED, "job 7: unknown to Slurm, before the run started", True),
        (
            State.RUNNING,
            Job("7", "TIMEOUT", "None"),
            State.FAILED,
            "job 7: TIMEOUT, before the run recorded how it ended",
            False,
        ),
        (
            State.RUNNING,
            Job("7", "OUT_OF_MEMORY", "OutOfMemory"),
            State.FAILED,
            "job 7: OUT_OF_MEMORY (OutOfMemory), before the run recorded",
            False,
        ),
        (
            State.RUNNING,
            Job("7", "NODE_FAIL", "None"),
            State.FAILED,
            "job 7: NODE_FAIL, before the run recorded how it ended",
            True,
        ),
        (State.RUNNING, None, State.FAILED, "job 7: unknown to Slurm, before the run recorded how it ended", True),
        (State.COMPLETED, Job("7", "FAILED", "NonZeroExitCode"), State.COMPLETED, "", False),
    ],
)
def test_the_last_word_for_a_job_that_is_over(
    state: State, job: Job | None, ended: State, reason: str, lost: bool, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.update_status(state=state, reason=None, job={"id": "7"})
    record_job_state(folder, "6", Job("6", "FAILED", "None"))  # of another time
    assert folder.status().state == state
    record_job_state(folder, "7", job)
    status = folder.status()
    assert (status.state, status.retriable) == (ended, lost)
    assert (status.reason or "").startswith(reason)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "cluster.accelerator=auto",
            "cluster.accelerator (auto) cannot be detected from this machine; write gpu or cpu",
        ),
        ("cluster.nodes=0", "cluster.nodes (0) must be at least 1"),
        ("cluster.time=4h", "cluster.time (4h) must be in Slurm's form: MINUTES, HH:MM:SS or D-HH:MM:SS"),
        ("cluster.grace_seconds=70000", "cluster.grace_seconds (70000) must be at most 65535"),
        ("cluster.max_requeues=-1", "cluster.max_requeues (-1) must be at least 0"),
        ("cluster.account=' '", "cluster.account is empty; write a name, or null"),
        ("cluster.container_mounts=[/a:/b]", "cluster.container_mounts (/a:/b) have no effect without"),
        ("cluster.options={--mem: 1G}", "cluster.options.--mem must be a long option of sbatch without its dashes"),
        ("cluster.options={time: 1}", "cluster.options.time is set by cluster.time; remove it"),
        ("cluster.options={output: x}", "cluster.options.output is needed by the batch script itself; remove it"),
        ('cluster.options={comment: "a\\nb"}', "cluster.options.comment ('a\\nb') must be one line"),
    ],
)
def test_what_sbatch_could_not_mean_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_run(SLURM, override.replace("\\n", "\n"))
    assert str(refused.value).startswith(message)
