"""Watch the ranks of a run through their shared store."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_cl.launch.root_cause import Heartbeat, Report, find_hung_ranks
from qwen_cl.runs.failure import FailureKind

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]


def unfinished_ranks(store: TCPStore, size: int) -> list[int]:
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
        return find_hung_ranks(
            [Heartbeat(rank, moment - self.heard_at[rank], self.heard[rank][2]) for rank in running],
            self.timeout_minutes,
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
