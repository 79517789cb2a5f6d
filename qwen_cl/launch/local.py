"""Start the processes of a run on this machine, follow them, and stop them with the launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from qwen_cl.config.cluster import Accelerator, ClusterConfig
from qwen_cl.config.errors import RunFailed, RunPreempted
from qwen_cl.config.override_text import printed_path
from qwen_cl.config.paths import ROOT
from qwen_cl.config.run import RunConfig
from qwen_cl.launch.signals import STOP_SIGNALS, handle_signals
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.reference import is_hub_reference
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State

STOP_GRACE = 120
"""Seconds that a run has to save and end after a stop request; then it is killed."""
SAME_STOP = 0.5
"""Seconds in which more signals are the same stop request: Linux sends one per thread of a parent that is killed."""
PR_SET_PDEATHSIG = 1


def worker_command(cluster: ClusterConfig, folder: RunFolder) -> list[str]:
    """Return the command of the single worker, or of the supervisor of one worker per device."""
    module = "qwen_cl.training.worker" if cluster.world_size == 1 else "qwen_cl.launch.supervisor"
    return [sys.executable, "-m", module, str(folder.directory)]


def worker_environment(config: RunConfig) -> dict[str, str]:
    environment = {**inherited_environment(), **run_variables(config)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    if config.cluster.accelerator is Accelerator.cpu:
        threads = max(1, (os.cpu_count() or 1) // config.cluster.devices)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def inherited_environment() -> dict[str, str]:
    """Return this process's environment without the variables that are for this process alone."""
    environment = {
        name: value  # SLURM_*: the launcher may be in a job itself
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    for token in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):  # only the launcher accesses the Hub
        environment.pop(token, None)
    for private in ("HYDRA_FULL_ERROR", "USE_TORCH", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):  # launch.py's own
        environment.pop(private, None)
    return environment


def run_variables(config: RunConfig) -> dict[str, str]:
    """Return the environment variables of a run's processes on any machine."""
    variables = {
        "HF_HUB_OFFLINE": "1",  # everything was downloaded to this cache before
        "HF_HUB_CACHE": str(HubSettings.of(config.model).cache_directory),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # NeMo sets this as the timeout of the group of all ranks. The supervisor, which can name the hung rank, must be
        # first.
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(int(config.cluster.timeout_minutes * 60) + 60),
    }
    if config.cluster.accelerator is Accelerator.cpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def paths_to_mount(config: RunConfig, directory: Path) -> list[Path]:
    """Return what a container needs of this machine: the code, the models, and the run's own folder."""
    paths = [ROOT, Path(run_variables(config)["HF_HUB_CACHE"]), directory]
    if not is_hub_reference(config.model.source):
        paths.append(Path(config.model.source.removeprefix("nemo://")))
    if config.model.adapter is not None:
        paths.append(Path(config.model.adapter))
    return list(dict.fromkeys(paths))


def execute(config: RunConfig, folder: RunFolder, watch: Callable[[], None]) -> None:
    """Run the worker to its end. ``watch`` is called several times a second to show progress.

    Raises:
        RunPreempted: the run stopped on request.
        RunFailed: its final status is neither COMPLETED nor PREEMPTED.
    """
    killed_before = out_of_memory_kills()
    with folder.log.open("ab") as log:
        process = subprocess.Popen(
            worker_command(config.cluster, folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=worker_environment(config),
            start_new_session=True,
            preexec_fn=partial(terminate_with_parent, os.getpid()),
        )
    try:
        with _forwarding_signals(process) as received:
            while process.poll() is None:
                watch()
                time.sleep(0.1)
    except BaseException as error:
        kill_group(process)
        folder.finish(State.FAILED, f"the launcher failed: {type(error).__name__}: {error}", FailureKind.error)
        raise
    kill_group(process)
    watch()
    _resolve_status(folder, process.returncode, bool(received), out_of_memory=out_of_memory_kills() > killed_before)
    raise_for_status(folder, interrupted=signal.SIGINT in received[:1])


def terminate_with_parent(parent: int | None = None) -> None:
    """Have the system send this process SIGTERM when its parent dies. Called in the child, before exec.

    With the process id of the parent, a parent that is already dead counts too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _forwarding_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Forward a first stop signal to the run, which saves and stops; kill it at a second. Yields the signals
    received."""
    received: list[int] = []
    received_at: list[float] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        if received_at:
            if time.monotonic() - received_at[0] > SAME_STOP:
                _signal_group(process)
            return
        received_at.append(time.monotonic())
        print("\nStopping: the run saves a checkpoint first. Press Ctrl-C again to kill it.", file=sys.stderr)
        process.send_signal(signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, STOP_GRACE)

    kill = handle_signals(lambda number, frame: _signal_group(process), [signal.SIGALRM])
    with kill, handle_signals(forward, (*STOP_SIGNALS, signal.SIGUSR1)):
        try:
            yield received
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill all processes that the run left behind."""
    _signal_group(process)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL without waiting: waiting in a handler would block the code that it interrupted."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def out_of_memory_kills() -> int:
    """Return the number of out-of-memory kills by the kernel so far; 0 if unknown."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _resolve_status(folder: RunFolder, returncode: int, stop_requested: bool, *, out_of_memory: bool) -> None:
    """Record the final status of a worker that ended without recording one."""
    if stop_requested and returncode == -signal.SIGTERM:  # it had no signal handler yet
        folder.finish(State.PREEMPTED, "stopped before training began", FailureKind.interrupted)
        return
    how = f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exited with {returncode}"
    why = ""
    if stop_requested:
        why = " after a stop request"
    elif out_of_memory:
        why = "; the kernel was out of memory"
    elif returncode == -signal.SIGKILL:
        why = " (out of memory?)"
    memory_exhausted = out_of_memory and not stop_requested
    kind = FailureKind.out_of_memory if memory_exhausted else FailureKind.rank_lost
    folder.finish(State.FAILED, f"the worker was {how}{why}", kind, retriable=not (stop_requested or out_of_memory))


def raise_for_status(folder: RunFolder, *, interrupted: bool) -> None:
    """Raise RunPreempted or RunFailed unless the run is COMPLETED."""
    status = folder.status()
    if status.state is State.PREEMPTED:
        raise RunPreempted(
            f"PREEMPTED at step {status.step}: {status.reason}. The same command with "
            f"{printed_path('hydra.run.dir', folder.directory)} resumes from there",
            interrupted=interrupted,
        )
    if status.state is not State.COMPLETED:
        raise RunFailed(f"FAILED: {status.reason}\nLog: {folder.log}")
