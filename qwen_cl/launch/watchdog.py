"""Watch the ranks of a run through their shared store."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_cl.launch.root_cause import FailureReport, Heartbeat, find_hung_ranks
from qwen_cl.runs.failure import FailureKind

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]


def unfinished_ranks(store: TCPStore, size: int) -> list[int]:
    """Return the ranks that have not reported that they are done."""
    return [rank for rank in range(size) if not store.check([f"done/{rank}"])]


def failures(store: TCPStore, size: int) -> dict[int, FailureReport]:
    """Return the reported failure of each rank that has one."""
    found = {}
    for rank in range(size):
        if store.check([key := f"failure/{rank}"]):
            number, reason, kind = json.loads(store.get(key))
            found[rank] = FailureReport(number, reason, FailureKind(kind))
    return found


class Watchdog:
    """The check whether any rank still makes progress, by the ranks' heartbeats."""

    def __init__(self, store: TCPStore, size: int, timeout_minutes: float) -> None:
        self.store = store
        self.timeout_minutes = timeout_minutes
        self.last_progress = self.last_check = time.monotonic()
        self.beats = [(0, "", False)] * size
        self.beat_at = [time.monotonic()] * size

    def check(self, running: Sequence[int]) -> str | None:
        """Return the reason to end the run, or None. Checks at most twice a second."""
        moment = time.monotonic()
        if moment - self.last_check < 0.5:
            return None
        self.last_check = moment
        for rank in running:
            self._read_beat(rank, moment)
        if moment - self.last_progress < self.timeout_minutes * 60:
            return None
        return find_hung_ranks(
            [Heartbeat(rank, moment - self.beat_at[rank], self.beats[rank][2]) for rank in running],
            self.timeout_minutes,
        )

    def _read_beat(self, rank: int, moment: float) -> None:
        key = f"beat/{rank}"
        if not self.store.check([key]):
            return
        number, progress, waits = json.loads(self.store.get(key))
        before, self.beats[rank] = self.beats[rank], (number, progress, waits)
        if number != before[0]:
            self.beat_at[rank] = moment
        if progress != before[1]:
            self.last_progress = moment
