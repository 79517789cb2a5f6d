"""What a rank tells the parent of its group (qwen_cl/launch/supervisor.py, or qwen_cl/launch/slurm/srun_supervisor.py):
that it lives, that it gets on, and why it failed.

Outside such a group (one process, or ranks that something else started) every function does nothing.
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
"""Environment variable: the address of the store, host:port, of the parent of the group."""
BEAT_SECONDS = 0.5
COMMUNICATING = (str(Path("torch", "distributed")), str(Path("core", "pipeline_parallel", "p2p_communication")))
"""Parts of the paths of files that wait for other ranks."""


class HeartbeatSender:
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
        with suppress(Exception):  # the parent is gone, and this process is about to be
            while True:
                number += 1
                self.store.set(f"beat/{self.rank}", json.dumps([number, *self._progress()]))
                time.sleep(BEAT_SECONDS)

    def _progress(self) -> tuple[str, bool]:
        """What changes with progress, and whether other ranks are waited for.

        Outside of training nobody counts, so there any movement is progress.
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


_member: HeartbeatSender | None = None


def start_heartbeat() -> None:
    """Early in a rank's process."""
    global _member
    if address := os.environ.get(GROUP):
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # the parent asks where a rank is that hangs
        _member = HeartbeatSender(address, int(os.environ.get("RANK") or os.environ["SLURM_PROCID"]))


def start_step_tracking() -> None:
    """From now on only :func:`progress` counts as such."""
    if _member is not None:
        _member.training = True
        _member.steps += 1


def progress() -> None:
    """Of the main thread: a step, or some batches of a longer task."""
    if _member is not None:
        _member.steps += 1


def end_steps() -> None:
    if _member is not None:
        _member.training = False


def mark_done() -> None:
    """At a good end: whoever waits for the others need not wonder about this one."""
    if _member is not None:
        with suppress(RuntimeError):
            _member.store.set(f"done/{_member.rank}", "")


def report_failure(reason: str, kind: FailureKind) -> bool:
    """False where there is no parent to hear it. The order of the reports is that of the failures."""
    if _member is None:
        return False
    try:
        number = _member.store.add("failures", 1)
        _member.store.set(f"failure/{_member.rank}", json.dumps([number, reason, kind]))
    except RuntimeError:  # the store's own, for whatever befell it
        return False
    return True
