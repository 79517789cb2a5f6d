"""Report from a rank to its supervisor (launch/supervisor.py or launch/slurm/srun_supervisor.py): heartbeats, progress,
and the reason of a failure.

Without a supervisor (a single process, or ranks that something else started) every function does nothing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from qwen_cl.runs.failure import FailureKind

GROUP = "QWEN_CL_GROUP"
"""Environment variable: host:port of the supervisor's store."""
BEAT_SECONDS = 0.5
COMMUNICATING = (str(Path("torch", "distributed")), str(Path("core", "pipeline_parallel", "p2p_communication")))
"""Path fragments of source files in which a rank waits for other ranks."""


class HeartbeatSender:
    """The thread that sends heartbeats of this rank to the supervisor's store."""

    def __init__(self, address: str, rank: int) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host, _, port = address.rpartition(":")
        self.store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=30))
        self.rank = rank
        self.steps = 0
        self.training = False
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def _beat(self) -> None:
        number = 0
        with suppress(Exception):  # the supervisor is gone, and this process ends soon
            while True:
                number += 1
                self.store.set(f"beat/{self.rank}", json.dumps([number, *self._progress()]))
                time.sleep(BEAT_SECONDS)

    def _progress(self) -> tuple[str, bool]:
        """Return a text that changes with progress, and whether the rank waits for other ranks.

        Outside of training no steps are counted, so any movement of the main thread is progress.
        """
        frames = list(_frames(sys._current_frames().get(threading.main_thread().ident or 0)))
        waits = any(part in frame.f_code.co_filename for frame in frames for part in COMMUNICATING)
        if self.training:
            return f"step {self.steps}", waits
        return " ".join(f"{id(frame.f_code)}.{frame.f_lasti}" for frame in frames), waits


def _frames(frame: FrameType | None) -> Any:
    while frame is not None:
        yield frame
        frame = frame.f_back


_sender: HeartbeatSender | None = None


def start_heartbeat() -> None:
    """Start sending heartbeats. Called early in a rank's process."""
    global _sender
    if address := os.environ.get(GROUP):
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # the supervisor requests the stacks of a hung rank
        _sender = HeartbeatSender(address, int(os.environ.get("RANK") or os.environ["SLURM_PROCID"]))


def start_step_tracking() -> None:
    """Count only calls of :func:`progress` as progress from now on."""
    if _sender is not None:
        _sender.training = True
        _sender.steps += 1


def progress() -> None:
    """Report progress from the main thread: a step, or some batches of a longer task."""
    if _sender is not None:
        _sender.steps += 1


def end_steps() -> None:
    if _sender is not None:
        _sender.training = False


def mark_done() -> None:
    """Report a successful end, so that the supervisor no longer watches this rank."""
    if _sender is not None:
        with suppress(RuntimeError):
            _sender.store.set(f"done/{_sender.rank}", "")


def report_failure(reason: str, kind: FailureKind) -> bool:
    """Report a failure, numbered in the order of the failures. Returns False without a supervisor."""
    if _sender is None:
        return False
    try:
        number = _sender.store.add("failures", 1)
        _sender.store.set(f"failure/{_sender.rank}", json.dumps([number, reason, kind]))
    except RuntimeError:  # raised by the store for any failure
        return False
    return True
