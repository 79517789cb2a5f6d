"""Which of several ranks is the reason that a run failed: the others fail, or wait, because it did."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

BROKEN_BY_OTHERS = re.compile(
    r"gloo|nccl|DistBackendError|DistNetworkError|DistStoreError|connection (was )?(closed|reset|refused)|broken pipe"
    r"|process ?group",
    re.IGNORECASE,
)
"""How a collective fails because another rank is gone."""


@dataclass(frozen=True, slots=True)
class Fallen:
    """A rank that ended otherwise than well, not at our hands."""

    rank: int
    returncode: int
    """Negative: the signal that killed it."""
    reason: str | None = None
    """What it reported itself."""
    number: int = 0
    """Of its report among all."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Of a rank that is still there, while no rank gets on."""

    rank: int
    silent_for: float
    """Seconds since it was last heard of."""
    waits: bool
    """For other ranks."""


def root_cause(fallen: Sequence[Fallen], left: Sequence[int] = (), *, out_of_memory: bool = False) -> tuple[str, bool]:
    """The reason, and whether the rank was lost to something outside the run (another attempt may succeed).

    ``left`` are the ranks that went on while the others fell."""
    killed = [each for each in fallen if each.returncode == -signal.SIGKILL]
    reported = sorted((each for each in fallen if each.reason), key=lambda each: each.number)
    own = [each for each in reported if not BROKEN_BY_OTHERS.search(each.reason or "")]
    crashed = [each for each in fallen if each.returncode < 0 and not each.reason]
    if killed:
        why = "; the kernel was out of memory" if out_of_memory else ""
        return f"{_were([each.rank for each in killed])} killed by SIGKILL{why}", not out_of_memory
    if own:
        return f"rank {own[0].rank}: {own[0].reason}", False
    if crashed:
        return f"rank {crashed[0].rank} was killed by {signal.Signals(-crashed[0].returncode).name}", True
    if reported and left:
        return f"{_were(left)} hanging; what rank {reported[0].rank} says: {reported[0].reason}", True
    if reported:
        return f"rank {reported[0].rank}: {reported[0].reason}", False
    return f"rank {fallen[0].rank} exited with {fallen[0].returncode}", False


def who_hangs(beats: Sequence[Beat], minutes: float) -> str:
    """The reason, once no rank has got on for so long."""
    silent = [beat for beat in beats if beat.silent_for > minutes * 60 / 2]
    busy = [beat for beat in beats if not beat.waits]
    after = f"no progress in {minutes:g} minutes (cluster.timeout_minutes)"
    if silent:
        return f"{_were([beat.rank for beat in silent])} hanging: {after}, and no sign of life"
    if busy and len(busy) < len(beats):
        for_whom = "it" if len(busy) == 1 else "them"
        return f"{_were([beat.rank for beat in busy])} hanging: {after}, while the others wait for {for_whom}"
    return f"all ranks hang: {after}, {'none' if busy else 'each'} waiting for others"


def _were(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} was" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} were"
