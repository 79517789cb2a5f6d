"""The parent of a run's ranks on this machine: ``python -m qwen_cl.launch.supervisor RUN_DIRECTORY``.

Does what torchrun does (the same variables, the same store for all) and what it does not: says which rank was the
first to fail and why, ends a run in which one hangs, and leaves as much time to save as a stop needs. torchrun's own
SIGTERM to the ranks that a failure leaves would be a wish to save here, and it kills them 30 seconds after it.
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
from qwen_cl.launch.rendezvous import meeting_variables, open_store
from qwen_cl.launch.root_cause import RankFailure, root_cause
from qwen_cl.launch.watchdog import Watch, failures
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

FAILURE_GRACE = 10
"""Seconds the other ranks have to end by themselves once one has failed: to close W&B's run, and say their part."""
STACK_SECONDS = 1
"""Until a rank has written where it is."""


class Process(Protocol):
    """Of subprocess.Popen what is used here."""

    pid: int

    def poll(self) -> int | None: ...


Start = Callable[[Mapping[str, str]], Process]
"""A rank, with this environment."""


def main(directory: str) -> int:
    register_schemas()
    folder = RunFolder(directory)
    config = load_config(folder.config)
    command = [sys.executable, "-m", "qwen_cl.training.worker", directory]
    prepare = partial(terminate_with_parent, os.getpid())

    def start(environment: Mapping[str, str]) -> Process:
        return subprocess.Popen(command, env=dict(environment), preexec_fn=prepare)

    group = RankGroup(folder, config.cluster.devices, config.cluster.timeout_minutes)
    signal.signal(signal.SIGTERM, group.ask_to_stop)
    return group.run(start)


class RankGroup:
    def __init__(self, folder: RunFolder, size: int, timeout_minutes: float) -> None:
        self.folder = folder
        self.size = size
        self.timeout_minutes = timeout_minutes
        self.processes: list[Process] = []
        self.asked = False

    def run(self, start: Start) -> int:
        """To the end of all ranks; the exit code. What went wrong is in the folder's status."""
        killed_before = out_of_memory_kills()
        try:
            store = open_store()
        except RuntimeError as error:
            self.folder.finish(State.FAILED, " ".join(str(error).split()), FailureKind.invalid_input)
            return 1
        for rank in range(self.size):
            self.processes.append(start(_environment(rank, self.size, store.port)))
        if self.asked:  # while they were started
            self.ask_to_stop()
        hanging = self._follow(Watch(store, self.size, self.timeout_minutes))
        if hanging is not None:
            self._show_stacks()
            self._kill()
            self.folder.finish(State.FAILED, hanging, FailureKind.hung, retriable=True)
            return 1
        if not any(map(_failed, self._returncodes())):
            return EXIT_PREEMPTED if EXIT_PREEMPTED in self._returncodes() else 0
        left = self._wait_for_other_ranks()
        fallen = self._fallen(store, left)
        if self.asked and all(each.returncode == -signal.SIGTERM for each in fallen):  # they did not listen yet
            self.folder.finish(State.PREEMPTED, "stopped before training began", FailureKind.interrupted)
            return 0
        cause = root_cause(fallen, left, out_of_memory=out_of_memory_kills() > killed_before)
        reason = cause.reason + (" when it was asked to stop" if self.asked and cause.retriable else "")
        self.folder.finish(State.FAILED, reason, cause.kind, retriable=cause.retriable)
        return 1

    def _follow(self, watch: Watch) -> str | None:
        """Until all have ended or one has failed; or why nobody gets on any more."""
        while True:
            returncodes = self._returncodes()
            if any(map(_failed, returncodes)) or None not in returncodes:
                return None
            if (hanging := watch.look([rank for rank, code in enumerate(returncodes) if code is None])) is not None:
                return hanging
            time.sleep(0.1)

    def _wait_for_other_ranks(self) -> list[int]:
        """To end by themselves. Those that do not, which are killed."""
        deadline = time.monotonic() + FAILURE_GRACE
        while None in self._returncodes() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [rank for rank, code in enumerate(self._returncodes()) if code is None]
        self._kill()
        return left

    def _fallen(self, store: TCPStore, left: Sequence[int]) -> list[RankFailure]:
        """Whom we killed is no reason, but what it said may be."""
        reported, fallen = failures(store, self.size), []
        for rank, code in enumerate(self._returncodes()):
            code = 0 if rank in left or not _failed(code) else code
            if code or rank in reported:
                fallen.append(RankFailure(rank, code or 0, reported.get(rank)))
        return fallen

    def _returncodes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def ask_to_stop(self, *args: Any) -> None:
        self.asked = True
        self._signal(signal.SIGTERM)

    def _show_stacks(self) -> None:
        """Where each rank is, in the run's log. One that is stopped goes on for as long as that takes."""
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                print(f"Rank {rank}, process {process.pid}, is at:", file=sys.stderr, flush=True)
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
    """Of a rank that has ended: in any other way but well, or asked to stop."""
    return returncode not in (None, 0, EXIT_PREEMPTED)


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        **os.environ,
        **meeting_variables("127.0.0.1", port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "qwen_cl",
        GROUP: f"127.0.0.1:{port}",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
