"""Where the ranks of a run meet, and tell the process that started them how they are (qwen_cl/member.py)."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_cl.blame import Beat, Report, who_hangs
from qwen_cl.runs.failure import FailureKind

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def open_store() -> TCPStore:
    """For the ranks to find each other, and to report to this process. Without MASTER_PORT the system picks the port,
    so it cannot be taken.

    Raises:
        RuntimeError: MASTER_PORT is taken.
    """
    from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

    port = int(os.environ.get("MASTER_PORT", "0"))
    try:
        return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    except DistNetworkError as error:
        raise RuntimeError(
            f"MASTER_PORT ({port}) cannot be listened on (in use?); name another, or unset it and a free one is taken"
        ) from error


def free_port() -> int:
    """Where there is no store to hold one: free now, and in the seconds that the ranks take to get there. None that the
    system gives to whoever connects somewhere (``ip_local_port_range``), and another each time.

    Raises:
        OSError: many were tried, and all are taken.
    """
    first, last = map(int, EPHEMERAL.read_text(encoding="ascii").split())
    others = [port for port in range(20_000, 65_536) if not first <= port <= last]
    *tries, final = random.sample(others, min(100, len(others))) or [0]
    for port in tries:
        with suppress(OSError), socket.create_server(("", port)):
            return port
    with socket.create_server(("", final)) as server:
        return int(server.getsockname()[1])


def meeting_variables(address: str, port: int) -> dict[str, str]:
    """What tells torch in a rank's process that the store is there already (torch/distributed/rendezvous.py)."""
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def still_there(store: TCPStore, size: int) -> list[int]:
    """The ranks that have not said that they are done."""
    return [rank for rank in range(size) if not store.check([f"done/{rank}"])]


def failures(store: TCPStore, size: int) -> dict[int, Report]:
    """Return why each rank failed that reported it."""
    found = {}
    for rank in range(size):
        if store.check([key := f"failure/{rank}"]):
            number, reason, kind = json.loads(store.get(key))
            found[rank] = Report(number, reason, FailureKind(kind))
    return found


class Watch:
    """Whether any rank gets on, by what they say of themselves."""

    def __init__(self, store: TCPStore, size: int, timeout_minutes: float) -> None:
        self.store = store
        self.timeout_minutes = timeout_minutes
        self.last_progress = self.last_look = time.monotonic()
        self.heard = [(0, "", False)] * size
        self.heard_at = [time.monotonic()] * size

    def look(self, running: Sequence[int]) -> str | None:
        """The reason why the run has to end, if it has; some times a second at most."""
        moment = time.monotonic()
        if moment - self.last_look < 0.5:
            return None
        self.last_look = moment
        for rank in running:
            self._hear(rank, moment)
        if moment - self.last_progress < self.timeout_minutes * 60:
            return None
        return who_hangs(
            [Beat(rank, moment - self.heard_at[rank], self.heard[rank][2]) for rank in running], self.timeout_minutes
        )

    def _hear(self, rank: int, moment: float) -> None:
        key = f"beat/{rank}"
        if not self.store.check([key]):
            return
        number, progress, waits = json.loads(self.store.get(key))
        before, self.heard[rank] = self.heard[rank], (number, progress, waits)
        if number != before[0]:
            self.heard_at[rank] = moment
        if progress != before[1]:
            self.last_progress = moment
