"""Faults while downloading from the Hub, and concurrent processes, with the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from tests.conftest import ROOT
from tests.support.hub import Fault, client_environment
from tests.support.machine import SHARD, SMALL_FILES, WEIGHT_FILES, Machine, model_files, new_machine, weights_of

pytestmark = pytest.mark.slow

CHUNK = 10 * 2**20
"""Bytes that huggingface_hub receives from a connection before it writes any."""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with new_machine(tmp_path) as machine:
        yield machine


def test_an_interrupted_download_resumes_where_it_was(machine: Machine) -> None:
    machine.hub.inject(SHARD, Fault.cut, 5000)
    assert machine.resolve("hf://org/tiny", weights=True)["commit"] == machine.newest
    assert [request.range for request in machine.hub.gets(SHARD)] == [None, "bytes=5000-"]
    assert machine.said == [
        "Fetching 6 files (238 bytes) of hf://org/tiny",
        "Fetching 1 file (13.0 kB) of hf://org/tiny",
    ]


@pytest.mark.parametrize(
    ("where", "fault", "number", "reason"),
    [
        ("config.json", Fault.status, 403, "the Hub refused the token it was given; renew HF_TOKEN or `hf auth login`"),
        ("config.json", Fault.status, 404, "config.json could not be fetched: HTTP 404; downloaded data is kept in "),
        ("api", Fault.disabled, 0, "the Hub has disabled this model; choose another"),
    ],
)
def test_an_answer_that_is_a_no(where: str, fault: Fault, number: int, reason: str, machine: Machine) -> None:
    machine.hub.inject(where, fault, number)
    assert machine.resolve("hf://org/tiny")["error"].startswith(f"model.source (hf://org/tiny): {reason}")


@pytest.mark.skipif(huggingface_hub.__version__ >= "1", reason="huggingface_hub 1.0 has no hf_transfer")
def test_a_way_to_download_that_is_not_installed(machine: Machine) -> None:
    error = machine.resolve("hf://org/tiny", HF_HUB_ENABLE_HF_TRANSFER="1")["error"]
    assert "could not be fetched: Fast download using 'hf_transfer' is enabled" in error


def test_a_download_that_breaks_twice_is_kept_for_the_next_command(machine: Machine) -> None:
    machine.hub.inject(SHARD, Fault.cut, 5000, times=2)
    assert machine.resolve("hf://org/tiny", weights=True)["error"] == (
        f"model.source (hf://org/tiny): {SHARD} could not be fetched: the connection was interrupted twice; "
        f"downloaded data is kept in {machine.home / 'hub'}, and the same command resumes the download"
    )
    machine.hub.requests.clear()
    directory = machine.resolve("hf://org/tiny", weights=True)["directory"]
    assert [request.range for request in machine.hub.gets(SHARD)] == ["bytes=10000-"]
    assert machine.hub.fetched() == {SHARD}
    assert (Path(directory) / SHARD).read_bytes() == weights_of(3)


@pytest.mark.slow
def test_a_hub_that_falls_silent_is_asked_for_the_rest(machine: Machine) -> None:
    """Resume as often as needed while each request makes progress."""
    content, piece = weights_of(4) * 20, 64 * 2**10  # requests keeps complete pieces of a stalled connection
    machine.hub.publish("org/tiny", {**model_files(4), SHARD: content}, "main")
    for _ in range(3):
        machine.hub.inject(SHARD, Fault.stall, piece)
    directory = machine.resolve("hf://org/tiny", weights=True, HF_HUB_DOWNLOAD_TIMEOUT="1")["directory"]
    ranges = [request.range for request in machine.hub.gets(SHARD)]
    assert ranges == [None, *(f"bytes={count * piece}-" for count in (1, 2, 3))]
    assert (Path(directory) / SHARD).read_bytes() == content


def test_what_an_older_download_left_is_resumed_or_begun_again(machine: Machine) -> None:
    """Resume a partial file, and discard one that is longer than the file."""
    digest = hashlib.sha256(weights_of(3)).hexdigest()
    partial = machine.repository / "blobs" / f"{digest}.incomplete"
    for left, asked in ((weights_of(3)[:700], "bytes=700-"), (bytes(20000), None)):
        shutil.rmtree(machine.home, ignore_errors=True)
        partial.parent.mkdir(parents=True)
        partial.write_bytes(left)
        machine.hub.requests.clear()
        directory = machine.resolve("hf://org/tiny", weights=True)["directory"]
        assert [request.range for request in machine.hub.gets(SHARD)] == [asked]
        assert (Path(directory) / SHARD).read_bytes() == weights_of(3)


def test_a_busy_hub_is_asked_again(machine: Machine) -> None:
    machine.hub.inject("api", Fault.status, 503)
    machine.hub.inject(SHARD, Fault.status, 503)
    assert machine.resolve("hf://org/tiny", weights=True)["commit"] == machine.newest
    assert machine.said == [line for line in machine.said if line.startswith("Fetching ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "number", "reason"),
    [(Fault.status, 503, "HTTP 503"), (Fault.html, 0, "the response is not that of a Hub")],
)
def test_no_answer_of_a_hub(fault: Fault, number: int, reason: str, machine: Machine) -> None:
    times = 2 if fault is Fault.status else 1
    machine.hub.inject("api", fault, number, times=times)
    error = machine.resolve("hf://org/tiny")["error"]
    assert error.startswith(f"model.source (hf://org/tiny) is not in the cache ({machine.home / 'hub'}), and the Hub ")
    assert f"did not answer ({reason}); check the network and model.endpoint or HF_ENDPOINT, or copy" in error
    machine.resolve("hf://org/tiny")
    machine.hub.inject("api", fault, number, times=times)
    machine.resolve("hf://org/tiny")
    because = f"of the cache: the Hub did not answer ({reason})"
    assert machine.said[-1] == f"hf://org/tiny is commit {machine.newest} {because}"


def test_a_disk_without_room(machine: Machine) -> None:
    machine.resolve("hf://org/tiny")
    machine.hub.claimed_sizes[SHARD] = 10**18
    commit = machine.hub.publish("org/tiny", model_files(5), "main")
    machine.hub.requests.clear()
    error = machine.resolve("hf://org/tiny", weights=True)["error"]
    assert error.startswith(f"model.cache ({machine.home / 'hub'}): hf://org/tiny needs 1.0 EB more and ")
    assert error.endswith(" are free; free some, or name a directory on another disk")
    assert SHARD not in machine.hub.fetched()
    assert commit != machine.newest


@pytest.mark.parametrize("before", ["nothing", "a damaged shard"])
def test_processes_that_start_together_fetch_each_file_once(before: str, machine: Machine) -> None:
    expected = SMALL_FILES | WEIGHT_FILES
    if before == "a damaged shard":
        directory = Path(machine.resolve("hf://org/tiny", weights=True)["directory"])
        (directory / SHARD).resolve().write_bytes(weights_of(3)[:-1] + b"?")
        expected = {SHARD}
    machine.hub.requests.clear()
    machine.hub.inject(SHARD, Fault.wait, 4)
    started = [machine.start(["hf://org/tiny"], weights=True) for _ in range(4)]
    answers = [machine.answers(process)[0] for process in started]
    assert {answer.get("commit") for answer in answers} == {machine.newest}
    for method in ("HEAD", "GET"):
        asked = [request.path for request in machine.hub.requests if request.method == method]
        assert sorted(path.rsplit("/", 1)[1] for path in asked if "/resolve/" in path) == sorted(expected)
    content = (Path(answers[0]["directory"]) / SHARD).read_bytes()
    assert content == weights_of(3)


@pytest.mark.slow
def test_control_c_leaves_a_download_that_resumes(machine: Machine, tmp_path: Path) -> None:
    """Run the launcher with a file large enough that part of it is on disk when the Hub stops responding."""
    large = bytes(CHUNK + 5000)
    machine.hub.publish("org/large", {**model_files(6), "tokenizer.json": large}, "main")
    machine.hub.inject("tokenizer.json", Fault.stall, CHUNK + 2000)
    arguments = ["model=hub", "model.source=hf://org/large", f"hydra.run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        env=client_environment(machine.hub.url, machine.home, HF_HUB_DOWNLOAD_TIMEOUT="60"),
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = machine.home / "hub/models--org--large/blobs"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size == CHUNK for path in partial.glob("*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "Fetching 5 files (10.5 MB) of hf://org/large\n"
    assert not (tmp_path / "run").exists()
    machine.hub.requests.clear()
    assert machine.resolve("hf://org/large")["size"] == 6
    assert [request.range for request in machine.hub.gets("tokenizer.json")] == [f"bytes={CHUNK}-"]
