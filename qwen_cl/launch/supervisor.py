"""Supervise the ranks of a run on this machine: ``python -m qwen_cl.launch.supervisor RUN_DIRECTORY``.

It does what torchrun does (the same variables, one store for all ranks) and more: it reports which rank failed first
and why, ends a run with a hung rank, and allows as much time to save as a stop needs. torchrun sends SIGTERM to the
ranks that remain after a failure, which would be a stop request here, and kills them 30 seconds later.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from qwen_cl.config.errors import EXIT_PREEMPTED
from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.launch.heartbeat import GROUP
from qwen_cl.launch.local import out_of_memory_kills, terminate_with_parent
from qwen_cl.launch.rendezvous import open_store, rendezvous_variables
from qwen_cl.launch.root_cause import RankFailure, root_cause
from qwen_cl.launch.watchdog import Watchdog, failures
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

FAILURE_GRACE = 10
"""Seconds that the other ranks have to end by themselves after one has failed: to finish W&B and report."""
STACK_SECONDS = 1
"""Seconds for a rank to write its stack."""


class Process(Protocol):
    """The part of subprocess.Popen that the supervisor uses."""

    pid: int

    def poll(self) -> int | None: ...


Start = Callable[[Mapping[str, str]], Process]
"""Start one rank with this environment."""


def main(directory: str) -> int:
    register_schemas()
    folder = RunFolder(directory)
    config = load_config(folder.config)
    command = [sys.executable, "-m", "qwen_cl.training.worker", directory]
    prepare = partial(terminate_with_parent, os.getpid())

    def start(environment: Mapping[str, str]) -> Process:
        return subprocess.Popen(command, env=dict(environment), preexec_fn=prepare)

    group = RankGroup(folder, config.cluster.devices, config.cluster.timeout_minutes)
    signal.signal(signal.SIGTERM, group.request_stop)
    return group.run(start)


class RankGroup:
    """The ranks of a run on this machine."""

    def __init__(self, folder: RunFolder, size: int, timeout_minutes: float) -> None:
        self.folder = folder
        self.size = size
        self.timeout_minutes = timeout_minutes
        self.processes: list[Process] = []
        self.stop_requested = False

    def run(self, start: Start) -> int:
        """Run all ranks to their end, record a failure in the folder's status, and return the exit code."""
        killed_before = out_of_memory_kills()
        try:
            store = open_store()
        except RuntimeError as error:
            self.folder.finish(State.FAILED, " ".join(str(error).split()), FailureKind.invalid_input)
            return 1
        for rank in range(self.size):
            self.processes.append(start(_environment(rank, self.size, store.port)))
        if self.stop_requested:  # while the ranks were starting
            self.request_stop()
        reason = self._follow(Watchdog(store, self.size, self.timeout_minutes))
        if reason is not None:
            self._show_stacks()
            self._kill()
            self.folder.finish(State.FAILED, reason, FailureKind.hung, retriable=True)
            return 1
        if not any(map(_failed, self._returncodes())):
            return EXIT_PREEMPTED if EXIT_PREEMPTED in self._returncodes() else 0
        running = self._wait_for_other_ranks()
        rank_failures = self._rank_failures(store, running)
        if self.stop_requested and all(each.returncode == -signal.SIGTERM for each in rank_failures):  # no handler yet
            self.folder.finish(State.PREEMPTED, "stopped before training began", FailureKind.interrupted)
            return 0
        cause = root_cause(rank_failures, running, out_of_memory=out_of_memory_kills() > killed_before)
        reason = cause.reason + (" after a stop request" if self.stop_requested and cause.retriable else "")
        self.folder.finish(State.FAILED, reason, cause.kind, retriable=cause.retriable)
        return 1

    def _follow(self, watchdog: Watchdog) -> str | None:
        """Wait until all ranks have ended or one has failed. Returns a reason only if no rank makes progress any
        more."""
        while True:
            returncodes = self._returncodes()
            if any(map(_failed, returncodes)) or None not in returncodes:
                return None
            running = [rank for rank, code in enumerate(returncodes) if code is None]
            if (reason := watchdog.check(running)) is not None:
                return reason
            time.sleep(0.1)

    def _wait_for_other_ranks(self) -> list[int]:
        """Give the ranks that are running time to end; kill and return those that did not."""
        deadline = time.monotonic() + FAILURE_GRACE
        while None in self._returncodes() and time.monotonic() < deadline:
            time.sleep(0.1)
        running = [rank for rank, code in enumerate(self._returncodes()) if code is None]
        self._kill()
        return running

    def _rank_failures(self, store: TCPStore, killed: Sequence[int]) -> list[RankFailure]:
        """Return the failures of ranks. Of a rank that the supervisor killed, only its own report counts."""
        reported, rank_failures = failures(store, self.size), []
        for rank, code in enumerate(self._returncodes()):
            code = 0 if rank in killed or not _failed(code) else code
            if code or rank in reported:
                rank_failures.append(RankFailure(rank, code or 0, reported.get(rank)))
        return rank_failures

    def _returncodes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def request_stop(self, *args: Any) -> None:
        self.stop_requested = True
        self._signal(signal.SIGTERM)

    def _show_stacks(self) -> None:
        """Write the stack of each rank to the run's log. A stopped process is continued for it."""
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                print(f"Rank {rank}, process {process.pid}, stack:", file=sys.stderr, flush=True)
                os.kill(process.pid, signal.SIGUSR2)
                os.kill(process.pid, signal.SIGCONT)
                time.sleep(STACK_SECONDS)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        while None in self._returncodes():
            time.sleep(0.05)

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.kill(process.pid, number)


def _failed(returncode: int | None) -> bool:
    """Return whether a rank ended other than successfully or by preemption; False while it is running."""
    return returncode not in (None, 0, EXIT_PREEMPTED)


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets."""
    return {
        **os.environ,
        **rendezvous_variables("127.0.0.1", port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "qwen_cl",
        GROUP: f"127.0.0.1:{port}",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
