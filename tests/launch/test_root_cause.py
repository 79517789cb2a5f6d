"""The root cause is found where several ranks failed or none makes progress."""

from __future__ import annotations

import pytest

from qwen_cl.launch.root_cause import FailureReport, Heartbeat, RankFailure, RootCause, find_hung_ranks, root_cause
from qwen_cl.runs.failure import FailureKind

PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
ERROR, COLLECTIVE = FailureKind.error, FailureKind.collective_failed
OUT_OF_MEMORY = "OutOfMemoryError: CUDA out of memory"


def test_a_broken_collective_is_never_the_reason_where_there_is_another() -> None:
    other = RankFailure(0, 1, FailureReport(1, PEER, COLLECTIVE))
    killed, crashed = RankFailure(1, -9), RankFailure(1, -11)
    raised = RankFailure(1, 1, FailureReport(2, "ValueError: no", ERROR))
    assert root_cause([other, killed]) == RootCause("rank 1 was killed by SIGKILL", FailureKind.rank_lost, True)
    assert root_cause([other, crashed]) == RootCause("rank 1 was killed by SIGSEGV", FailureKind.rank_lost, True)
    assert root_cause([other, raised]) == RootCause("rank 1: ValueError: no", ERROR)
    broken_too = RankFailure(1, 1, FailureReport(2, PEER, COLLECTIVE))
    assert root_cause([other, broken_too]) == RootCause(f"rank 0: {PEER}", COLLECTIVE)


def test_of_several_errors_the_first_counts() -> None:
    first = RankFailure(1, 1, FailureReport(1, OUT_OF_MEMORY, FailureKind.out_of_memory))
    cause = RootCause(f"rank 1: {OUT_OF_MEMORY}", FailureKind.out_of_memory)
    assert root_cause([RankFailure(0, 1, FailureReport(2, "KeyError: b", ERROR)), first]) == cause
    # NCCL's own watchdog aborts the ranks that wait for the one that failed.
    assert root_cause([RankFailure(0, -6), first]) == cause


def test_a_kill_for_want_of_memory_is_no_loss_that_another_attempt_mends() -> None:
    fallen = [RankFailure(0, -9), RankFailure(3, -9)]
    assert root_cause(fallen) == RootCause("ranks 0, 3 were killed by SIGKILL", FailureKind.rank_lost, True)
    full = RootCause("ranks 0, 3 were killed by SIGKILL; the kernel was out of memory", FailureKind.out_of_memory)
    assert root_cause(fallen, out_of_memory=True) == full


def test_a_rank_that_makes_progress_while_all_others_wait_is_hung() -> None:
    given_up = [
        RankFailure(0, 1, FailureReport(2, "Connection reset", COLLECTIVE)),
        RankFailure(2, 1, FailureReport(1, PEER, COLLECTIVE)),
    ]
    hung = RootCause(f"rank 1 hung; rank 2 reported: {PEER}", FailureKind.hung, True)
    assert root_cause(given_up, [1]) == hung
    raised = RankFailure(1, 0, FailureReport(3, "ValueError: a", ERROR))
    assert root_cause([*given_up, raised], [1]) == RootCause("rank 1: ValueError: a", ERROR)


def test_an_exit_without_a_word() -> None:
    assert root_cause([RankFailure(2, 3)]) == RootCause("rank 2 exited with 3", ERROR)


AFTER = "no progress in 2 minutes (cluster.timeout_minutes)"


@pytest.mark.parametrize(
    ("beats", "reason"),
    [
        ([Heartbeat(0, 1, True), Heartbeat(1, 119, False)], f"rank 1 hung: {AFTER}, and no heartbeat"),
        ([Heartbeat(0, 119, True), Heartbeat(1, 1, False)], f"rank 0 hung: {AFTER}, and no heartbeat"),
        ([Heartbeat(0, 1, True), Heartbeat(1, 1, False)], f"rank 1 hung: {AFTER}, while the others wait for it"),
        (
            [Heartbeat(0, 1, False), Heartbeat(1, 1, True), Heartbeat(2, 1, False)],
            f"ranks 0, 2 hung: {AFTER}, while the others wait for them",
        ),
        ([Heartbeat(0, 1, True), Heartbeat(1, 1, True)], f"all ranks hung: {AFTER}, each waiting for others"),
        ([Heartbeat(0, 1, False), Heartbeat(1, 1, False)], f"all ranks hung: {AFTER}, none waiting for others"),
    ],
)
def test_who_hangs(beats: list[Heartbeat], reason: str) -> None:
    assert find_hung_ranks(beats, 2) == reason
