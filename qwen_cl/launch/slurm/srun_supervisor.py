"""Start and supervise a job's workers: ``python -m qwen_cl.launch.slurm.srun_supervisor RUN_DIRECTORY srun …``.

Run by the batch script. The ranks meet at a store that this process holds, so that no other process can take the port;
they send their heartbeats to it, so that a hung rank is named instead of blocking the job until its time limit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec

from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.launch.heartbeat import GROUP
from qwen_cl.launch.rendezvous import free_port, open_store, rendezvous_variables
from qwen_cl.launch.root_cause import RankFailure, root_cause
from qwen_cl.launch.slurm import commands
from qwen_cl.launch.watchdog import Watchdog, failures, unfinished_ranks
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State

STACK_SECONDS = 3
"""Seconds for the ranks of all nodes to write their stacks."""


def main(directory: str, *command: str) -> int:
    """Run srun to its end and return its exit code, which ``qwen_cl.launch.slurm.job_hooks end`` interprets if no rank
    reported a failure."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm ends the workers; job_hooks end follows
    register_schemas()
    folder = RunFolder(directory)
    cluster = load_config(folder.config).cluster
    try:
        address = os.environ.get("MASTER_ADDR") or commands.address_of(os.environ["SLURMD_NODENAME"])
    except commands.SlurmUnavailable as error:
        why = f"the address for the rendezvous of the ranks is unknown: {error}"
        folder.finish(State.FAILED, why, FailureKind.rank_lost, retriable=True)
        return 1
    if find_spec("torch") is None:  # it is only in the container
        print("torch is only in the container: hung ranks will not be detected.", flush=True)
        port = os.environ.get("MASTER_PORT") or str(free_port())
        return _code(_start(command, {"MASTER_ADDR": address, "MASTER_PORT": port}).wait())
    try:
        store = open_store()
    except RuntimeError as error:
        folder.finish(State.FAILED, " ".join(str(error).split()), FailureKind.invalid_input)
        return 1
    group = {GROUP: f"{address}:{store.port}"} if cluster.world_size > 1 else {}
    process = _start(command, {**rendezvous_variables(address, store.port), **group})
    size = cluster.world_size
    watchdog = Watchdog(store, size, cluster.timeout_minutes)
    while (code := process.poll()) is None:
        if size > 1 and (running := unfinished_ranks(store, size)) and (reason := watchdog.check(running)) is not None:
            folder.finish(State.FAILED, reason, FailureKind.hung, retriable=True)
            _show_stacks()
            process.kill()  # Slurm ends what is left when the batch script does
            return 1
        time.sleep(0.5)
    reported = failures(store, size)
    if any(code < 128 or report.kind is not FailureKind.collective_failed for report in reported.values()):
        cause = root_cause([RankFailure(rank, 0, report) for rank, report in reported.items()])
        folder.finish(State.FAILED, cause.reason, cause.kind, retriable=cause.retriable)
    return _code(code)


def _start(command: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    default_handler = partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
    return subprocess.Popen(command, env={**os.environ, **variables}, preexec_fn=default_handler)


def _code(returncode: int) -> int:
    """Return the exit code as a shell reports it."""
    return returncode if returncode >= 0 else 128 - returncode


def _show_stacks() -> None:
    """Write the stack of each rank to the run's log. A stopped process is continued for it."""
    job = os.environ["SLURM_JOB_ID"]
    with suppress(commands.SlurmUnavailable):
        commands.signal_steps(job, "USR2")
        commands.signal_steps(job, "CONT")
        time.sleep(STACK_SECONDS)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
