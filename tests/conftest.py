"""The fixtures that tests share: a trained run and a few random models."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for each other spin on a busy core

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from qwen_cl.patches.imports import import_megatron
from qwen_cl.runs.folder import RunFolder
from tests.support.warm import warm_environment

pytest_plugins = ["tests.support.fault_table"]
import_megatron()  # before a test module imports Megatron by itself

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
FEW = f"data.instructions={ROOT}/tests/support/few/instructions"
"""The overrides for the demo data with five validation rows, for runs in which validation should be quick."""


SLOWEST = (
    "test_sweep",
    "test_slurm",
    "test_faults",
    "test_parallel",
    "test_run_stages",
    "test_hugging_face",
    "test_errors",
    "test_run",
)
"""The test files that start first, as each runs in one process and takes long."""

SHARED_RUNS = {"trained", "brief", "dated", "plain", "probed"}
"""The fixtures that train: the first test that uses one waits for its run."""


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and SHARED_RUNS.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@dataclass(frozen=True)
class Launched:
    """A finished `python launch.py`, with its output and its folder."""

    returncode: int
    stdout: str
    stderr: str
    folder: RunFolder


def launch(*arguments: str, directory: Path, environment: dict[str, str] | None = None, warm: bool = False) -> Launched:
    """Run the launcher as a user does, into ``directory``.

    With ``warm`` its child processes have NeMo imported already (tests.support.warm).
    """
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir={directory}", *arguments],
        cwd=ROOT,
        env=warm_environment(variables) if warm else variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return Launched(done.returncode, done.stdout, done.stderr, RunFolder(directory))


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all worker processes of a test session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session", autouse=True)
def cache(shared_directory: Path) -> Iterator[None]:
    """Put the cache into the tests' temporary folder instead of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        if "QWEN_CL_CACHE" not in os.environ:
            patch.setenv("QWEN_CL_CACHE", str(shared_directory / "cache"))
        yield


def launch_once(
    shared: Path, name: str, *arguments: str, environment: dict[str, str] | None = None, warm: bool = False
) -> Launched:
    """Return a run that several tests share; the first test that needs it starts it, in any process of the session."""
    directory, record = shared / name / "run", shared / f"{name}.txt"
    directory.parent.mkdir(exist_ok=True)
    with FileLock(f"{record}.lock"):
        if not record.exists():
            done = launch(*arguments, directory=directory, environment=environment, warm=warm)
            record.write_text(f"{done.returncode}\0{done.stdout}\0{done.stderr}", encoding="utf-8")
    returncode, stdout, stderr = record.read_text(encoding="utf-8").split("\0")
    return Launched(int(returncode), stdout, stderr, RunFolder(directory))


@pytest.fixture(scope="session")
def trained(shared_directory: Path) -> Launched:
    """Return the run of the README's main command: tiny model, demo data, LoRA."""
    without_key = {"WANDB_API_KEY": "", "NETRC": str(shared_directory / "no-netrc")}
    return launch_once(shared_directory, "trained", environment=without_key)
