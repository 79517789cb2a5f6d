"""Which rank is the reason, where several failed or none gets on."""

from __future__ import annotations

import pytest

from qwen_cl.blame import Beat, Fallen, Report, RootCause, root_cause, who_hangs
from qwen_cl.runs.failure import FailureKind

PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
ERROR, COLLECTIVE = FailureKind.error, FailureKind.collective_failed
OUT_OF_MEMORY = "OutOfMemoryError: CUDA out of memory"


def test_a_broken_collective_is_never_the_reason_where_there_is_another() -> None:
    other = Fallen(0, 1, Report(1, PEER, COLLECTIVE))
    killed, crashed = Fallen(1, -9), Fallen(1, -11)
    raised = Fallen(1, 1, Report(2, "ValueError: no", ERROR))
    assert root_cause([other, killed]) == RootCause("rank 1 was killed by SIGKILL", FailureKind.rank_lost, True)
    assert root_cause([other, crashed]) == RootCause("rank 1 was killed by SIGSEGV", FailureKind.rank_lost, True)
    assert root_cause([other, raised]) == RootCause("rank 1: ValueError: no", ERROR)
    broken_too = Fallen(1, 1, Report(2, PEER, COLLECTIVE))
    assert root_cause([other, broken_too]) == RootCause(f"rank 0: {PEER}", COLLECTIVE)


def test_of_several_errors_the_first_counts() -> None:
    first = Fallen(1, 1, Report(1, OUT_OF_MEMORY, FailureKind.out_of_memory))
    cause = RootCause(f"rank 1: {OUT_OF_MEMORY}", FailureKind.out_of_memory)
    assert root_cause([Fallen(0, 1, Report(2, "KeyError: b", ERROR)), first]) == cause
    # NCCL's own watchdog aborts the ranks that wait for the one that failed.
    assert root_cause([Fallen(0, -6), first]) == cause


def test_a_kill_for_want_of_memory_is_no_loss_that_another_attempt_mends() -> None:
    fallen = [Fallen(0, -9), Fallen(3, -9)]
    assert root_cause(fallen) == RootCause("ranks 0, 3 were killed by SIGKILL", FailureKind.rank_lost, True)
    full = RootCause("ranks 0, 3 were killed by SIGKILL; the kernel was out of memory", FailureKind.out_of_memory)
    assert root_cause(fallen, out_of_memory=True) == full


def test_a_rank_that_goes_on_while_all_others_give_up_hangs() -> None:
    given_up = [Fallen(0, 1, Report(2, "Connection reset", COLLECTIVE)), Fallen(2, 1, Report(1, PEER, COLLECTIVE))]
    hung = RootCause(f"rank 1 was hanging; what rank 2 says: {PEER}", FailureKind.hung, True)
    assert root_cause(given_up, [1]) == hung
    raised = Fallen(1, 0, Report(3, "ValueError: a", ERROR))
    assert root_cause([*given_up, raised], [1]) == RootCause("rank 1: ValueError: a", ERROR)


def test_an_exit_without_a_word() -> None:
    assert root_cause([Fallen(2, 3)]) == RootCause("rank 2 exited with 3", ERROR)


AFTER = "no progress in 2 minutes (cluster.timeout_minutes)"


@pytest.mark.parametrize(
    ("beats", "reason"),
    [
        ([Beat(0, 1, True), Beat(1, 119, False)], f"rank 1 was hanging: {AFTER}, and no sign of life"),
        ([Beat(0, 119, True), Beat(1, 1, False)], f"rank 0 was hanging: {AFTER}, and no sign of life"),
        ([Beat(0, 1, True), Beat(1, 1, False)], f"rank 1 was hanging: {AFTER}, while the others wait for it"),
        (
            [Beat(0, 1, False), Beat(1, 1, True), Beat(2, 1, False)],
            f"ranks 0, 2 were hanging: {AFTER}, while the others wait for them",
        ),
        ([Beat(0, 1, True), Beat(1, 1, True)], f"all ranks hang: {AFTER}, each waiting for others"),
        ([Beat(0, 1, False), Beat(1, 1, False)], f"all ranks hang: {AFTER}, none waiting for others"),
    ],
)
def test_who_hangs(beats: list[Beat], reason: str) -> None:
    assert who_hangs(beats, 2) == reason
