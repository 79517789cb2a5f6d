"""Find the rank that made a run fail: the others fail, or wait, as a consequence."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_cl.runs.failure import FailureKind


@dataclass(frozen=True, slots=True)
class FailureReport:
    """The failure that a rank reported."""

    number: int
    """Position among all reports, in the order of the failures."""
    reason: str
    kind: FailureKind


@dataclass(frozen=True, slots=True)
class RankFailure:
    """A rank that failed by itself, not because the supervisor killed it."""

    rank: int
    returncode: int
    """Exit code; negative for the signal that killed the rank."""
    report: FailureReport | None = None


@dataclass(frozen=True, slots=True)
class RootCause:
    """The failure that all others follow from."""

    reason: str
    kind: FailureKind
    retriable: bool = False
    """The failure was external to the run, so another attempt may succeed."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last heartbeat of a running rank, at a time when no rank makes progress."""

    rank: int
    silent_for: float
    """Seconds since the last heartbeat."""
    waits: bool
    """The rank waits for other ranks."""


def root_cause(
    rank_failures: Sequence[RankFailure], running: Sequence[int] = (), *, out_of_memory: bool = False
) -> RootCause:
    """Return why a run failed.

    ``running`` are the ranks that did not end by themselves after the others failed; ``out_of_memory`` tells that the
    kernel killed processes during the run.
    """
    killed = [each.rank for each in rank_failures if each.returncode == -signal.SIGKILL]
    if killed and out_of_memory:
        why = f"{_ranks(killed, 'was', 'were')} killed by SIGKILL; the kernel was out of memory"
        return RootCause(why, FailureKind.out_of_memory)
    if killed:
        return RootCause(f"{_ranks(killed, 'was', 'were')} killed by SIGKILL", FailureKind.rank_lost, retriable=True)
    reported = sorted(
        ((each.rank, each.report) for each in rank_failures if each.report), key=lambda each: each[1].number
    )
    for rank, report in reported:
        if report.kind is not FailureKind.collective_failed:
            return RootCause(f"rank {rank}: {report.reason}", report.kind)
    for each in rank_failures:
        if each.returncode < 0 and not each.report:
            number = signal.Signals(-each.returncode).name
            return RootCause(f"rank {each.rank} was killed by {number}", FailureKind.rank_lost, retriable=True)
    if not reported:
        return RootCause(f"rank {rank_failures[0].rank} exited with {rank_failures[0].returncode}", FailureKind.error)
    rank, report = reported[0]
    if running:
        why = f"{_ranks(running)} hung; rank {rank} reported: {report.reason}"
        return RootCause(why, FailureKind.hung, retriable=True)
    return RootCause(f"rank {rank}: {report.reason}", report.kind)


def find_hung_ranks(beats: Sequence[Heartbeat], minutes: float) -> str:
    """Return the reason of a run that made no progress for so many minutes: the hung ranks."""
    silent = [beat for beat in beats if beat.silent_for > minutes * 60 / 2]
    busy = [beat for beat in beats if not beat.waits]
    after = f"no progress in {minutes:g} minutes (cluster.timeout_minutes)"
    if silent:
        return f"{_ranks([beat.rank for beat in silent])} hung: {after}, and no heartbeat"
    if busy and len(busy) < len(beats):
        for_whom = "it" if len(busy) == 1 else "them"
        return f"{_ranks([beat.rank for beat in busy])} hung: {after}, while the others wait for {for_whom}"
    return f"all ranks hung: {after}, {'none' if busy else 'each'} waiting for others"


def _ranks(ranks: Sequence[int], singular: str = "", plural: str = "") -> str:
    named = f"rank {ranks[0]} {singular}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} {plural}"
    return named.rstrip()
