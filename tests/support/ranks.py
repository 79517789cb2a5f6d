"""The runner of probes in separate processes, because Megatron on a CPU permanently changes torch.

They are forked from one process that has imported NeMo (Python's own ``forkserver``): the import takes ten seconds, and
would otherwise be paid by every rank of every probe.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from qwen_cl.launch.rendezvous import free_port

LONGEST = 600.0
"""Seconds before a probe is killed; many times the duration of the longest."""
TOOK_TOO_LONG = 124
"""The exit code of the command ``timeout``."""
ROOT = Path(__file__).resolve().parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preloaded"])


@dataclass(frozen=True, slots=True)
class Ended:
    returncode: int
    """0, or the exit code of the first rank that failed."""
    log: str
    """The output of all ranks on both streams."""


def run_ranks(
    target: Callable[..., Any], *arguments: Any, ranks: int = 1, environment: Mapping[str, str] | None = None
) -> Ended:
    """Call ``target``, a function of a module, in each rank of a group as torchrun would start it.

    What ``target`` returns is its exit code. When one rank fails, the others are killed; so are all that have not ended
    after ``LONGEST``.
    """
    with tempfile.NamedTemporaryFile() as log:
        said = {**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)}
        said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        if ranks > 1:
            said |= {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1"}
        processes = [_start(target, arguments, rank, ranks, said, log.name) for rank in range(ranks)]
        failed, deadline = 0, time.monotonic() + LONGEST
        running = {process.sentinel: process for process in processes}
        while running and not failed:
            ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
            failed = 0 if ended else TOOK_TOO_LONG
            for sentinel in ended:
                process = running.pop(sentinel)
                process.join()
                failed = failed or process.exitcode or 0
        for process in running.values():
            process.kill()
            process.join()
        return Ended(failed, Path(log.name).read_text(encoding="utf-8", errors="replace"))


def _start(
    target: Callable[..., Any], arguments: tuple[Any, ...], rank: int, ranks: int, said: dict[str, str], log: str
) -> Any:
    own = {**said, "RANK": str(rank)} | ({"LOCAL_RANK": str(rank)} if ranks > 1 else {})
    return start_rank(target, arguments, own, log)


def start_rank(
    target: Callable[..., Any], arguments: tuple[Any, ...], environment: Mapping[str, str], log: str | Path
) -> Any:
    """Start one rank as a multiprocessing.Process, with its output in the file ``log``."""
    process = _context.Process(target=_run, args=(target, arguments, dict(environment), str(log)))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # for the server's own import of what it preloads
    try:
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return process


def _run(target: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    sys.exit(target(*arguments))
