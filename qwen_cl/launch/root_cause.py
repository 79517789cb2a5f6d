"""Which of several ranks is the reason that a run failed: the others fail, or wait, because it did."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_cl.runs.failure import FailureKind


@dataclass(frozen=True, slots=True)
class Report:
    """The failure of a rank in its own words."""

    number: int
    """Among all reports, in the order of the failures."""
    reason: str
    kind: FailureKind


@dataclass(frozen=True, slots=True)
class RankFailure:
    """A rank that ended otherwise than well, not at our hands."""

    rank: int
    returncode: int
    """Negative: the signal that killed it."""
    report: Report | None = None


@dataclass(frozen=True, slots=True)
class RootCause:
    """The one failure that all others follow from."""

    reason: str
    kind: FailureKind
    retriable: bool = False
    """The rank was lost to something outside the run, and another attempt may succeed."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Of a rank that is still there, while no rank gets on."""

    rank: int
    silent_for: float
    """Seconds since it was last heard of."""
    waits: bool
    """For other ranks."""


def root_cause(fallen: Sequence[RankFailure], left: Sequence[int] = (), *, out_of_memory: bool = False) -> RootCause:
    """Return why a run failed. ``left`` are the ranks that went on while the others fell; ``out_of_memory`` says that
    the kernel killed processes meanwhile."""
    killed = [each.rank for each in fallen if each.returncode == -signal.SIGKILL]
    if killed and out_of_memory:
        why = f"{_were(killed)} killed by SIGKILL; the kernel was out of memory"
        return RootCause(why, FailureKind.out_of_memory)
    if killed:
        return RootCause(f"{_were(killed)} killed by SIGKILL", FailureKind.rank_lost, retriable=True)
    reported = sorted(((each.rank, each.report) for each in fallen if each.report), key=lambda each: each[1].number)
    for rank, report in reported:
        if report.kind is not FailureKind.collective_failed:
            return RootCause(f"rank {rank}: {report.reason}", report.kind)
    for each in fallen:
        if each.returncode < 0 and not each.report:
            number = signal.Signals(-each.returncode).name
            return RootCause(f"rank {each.rank} was killed by {number}", FailureKind.rank_lost, retriable=True)
    if not reported:
        return RootCause(f"rank {fallen[0].rank} exited with {fallen[0].returncode}", FailureKind.error)
    rank, report = reported[0]
    if left:
        why = f"{_were(left)} hanging; what rank {rank} says: {report.reason}"
        return RootCause(why, FailureKind.hung, retriable=True)
    return RootCause(f"rank {rank}: {report.reason}", report.kind)


def find_hung_ranks(beats: Sequence[Heartbeat], minutes: float) -> str:
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
