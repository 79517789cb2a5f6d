"""A process of the warm Python starts, stops and ends like one of plain Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from qwen_cl.launch.local import inherited_environment
from tests.conftest import ROOT
from tests.support.warm import warm_environment

SHOW = "import sys; print(sys.executable)"


def warm_python() -> str:
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], env=warm_environment(os.environ), capture_output=True, text=True, check=True
    )
    return shown.stdout.strip()


def test_what_is_no_run_is_pythons_own() -> None:
    """Run a module with its own arguments, environment and exit code."""
    code = "import os, sys; print(sys.argv[1], os.environ['KEY'], 'torch' in sys.modules); sys.exit(7)"
    done = subprocess.run(
        [warm_python(), "-c", code, "a b"], env={**os.environ, "KEY": "here"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "a b here False\n", "")


@pytest.mark.parametrize("arguments", [[], ["absent"]])
def test_an_error_ends_it_as_it_ends_pythons(arguments: list[str], tmp_path: Path) -> None:
    command = ["-W", "ignore", "-m", "qwen_cl.training.worker", *arguments]
    environment = {**inherited_environment(), "PYTHONPATH": str(ROOT)}
    cold, warm = (
        subprocess.run([python, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for python in (sys.executable, warm_python())
    )
    assert cold.returncode == 1
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.stderr.splitlines()[-1] == cold.stderr.splitlines()[-1]


@contextmanager
def waiting(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """Return the client that requested a worker, and the worker, which waits for its config."""
    os.mkfifo(directory / "config.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [warm_python(), "-m", "qwen_cl.training.worker", "."], cwd=directory, env=environment
    ) as client:
        try:
            while not (found := workers(directory, client.pid)):
                assert client.poll() is None
            yield client, found[0]
        finally:
            client.kill()


def workers(directory: Path, client: int) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cwd"])
        if process.info["cwd"] == str(directory) and process.pid != client
    ]


def test_a_signal_reaches_it(tmp_path: Path) -> None:
    with waiting(tmp_path) as (client, worker):
        client.send_signal(signal.SIGTERM)
        assert client.wait(timeout=60) == -signal.SIGTERM
        worker.wait(timeout=60)


def test_who_is_killed_does_not_leave_it(tmp_path: Path) -> None:
    with waiting(tmp_path) as (client, worker):
        client.kill()
        worker.wait(timeout=60)
