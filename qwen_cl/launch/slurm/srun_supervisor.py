"""What starts a job's workers: ``python -m qwen_cl.launch.slurm.srun_supervisor RUN_DIRECTORY srun …``, in the batch
script.

The ranks meet at a store that this process holds, so that nobody else can have the port when they get there; and they
tell it how they are, so that one which hangs is named, where Slurm would wait until the job's time is up.
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
from qwen_cl.launch.rendezvous import free_port, meeting_variables, open_store
from qwen_cl.launch.root_cause import RankFailure, root_cause
from qwen_cl.launch.slurm import commands
from qwen_cl.launch.watchdog import Watch, failures, unfinished_ranks
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State

STACK_SECONDS = 3
"""Until the ranks of all nodes have written where they are."""


def main(directory: str, *command: str) -> int:
    """Returns what srun did. It is for ``qwen_cl.launch.slurm.job_hooks end`` to say what that means, where no rank
    said it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm ends the workers, and what comes after has the last word
    register_schemas()
    folder = RunFolder(directory)
    cluster = load_config(folder.config).cluster
    try:
        address = os.environ.get("MASTER_ADDR") or commands.address_of(os.environ["SLURMD_NODENAME"])
    except commands.SlurmUnavailable as error:
        why = f"nobody says where the ranks are to meet: {error}"
        folder.finish(State.FAILED, why, FailureKind.rank_lost, retriable=True)
        return 1
    if find_spec("torch") is None:  # it is in the container alone
        print("No torch outside the container: a rank that hangs will not be named.", flush=True)
        port = os.environ.get("MASTER_PORT") or str(free_port())
        return _code(_start(command, {"MASTER_ADDR": address, "MASTER_PORT": port}).wait())
    try:
        store = open_store()
    except RuntimeError as error:
        folder.finish(State.FAILED, " ".join(str(error).split()), FailureKind.invalid_input)
        return 1
    group = {GROUP: f"{address}:{store.port}"} if cluster.world_size > 1 else {}
    process = _start(command, {**meeting_variables(address, store.port), **group})
    size = cluster.world_size
    watch = Watch(store, size, cluster.timeout_minutes)
    while (code := process.poll()) is None:
        if size > 1 and (left := unfinished_ranks(store, size)) and (hanging := watch.look(left)) is not None:
            folder.finish(State.FAILED, hanging, FailureKind.hung, retriable=True)
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
    heard = partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
    return subprocess.Popen(command, env={**os.environ, **variables}, preexec_fn=heard)


def _code(returncode: int) -> int:
    """As a shell gives it."""
    return returncode if returncode >= 0 else 128 - returncode


def _show_stacks() -> None:
    """In the run's log. One that is stopped goes on for as long as that takes."""
    job = os.environ["SLURM_JOB_ID"]
    with suppress(commands.SlurmUnavailable):
        commands.signal_steps(job, "USR2")
        commands.signal_steps(job, "CONT")
        time.sleep(STACK_SECONDS)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
