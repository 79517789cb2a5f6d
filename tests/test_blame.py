"""Which rank is the reason, where several failed or none gets on."""

from __future__ import annotations

import pytest

from qwen_cl.blame import Beat, Fallen, root_cause, who_hangs

BROKEN = (
    "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242",
    "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited or there was a network error",
)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_collective_is_never_the_reason_where_there_is_another(broken: str) -> None:
    other = Fallen(0, 1, broken, 1)
    assert root_cause([other, Fallen(1, -9)]) == ("rank 1 was killed by SIGKILL", True)
    assert root_cause([other, Fallen(1, -11)]) == ("rank 1 was killed by SIGSEGV", True)
    assert root_cause([other, Fallen(1, 1, "ValueError: no", 2)]) == ("rank 1: ValueError: no", False)
    assert root_cause([other, Fallen(1, 1, broken, 2)]) == (f"rank 0: {broken}", False)


def test_of_several_errors_the_first_counts() -> None:
    assert root_cause([Fallen(0, 1, "KeyError: b", 2), Fallen(1, 1, "ValueError: a", 1)])[0] == "rank 1: ValueError: a"
    # NCCL's own watchdog aborts the ranks that wait for the one that failed.
    assert root_cause([Fallen(0, -6), Fallen(1, 1, "ValueError: a", 1)])[0] == "rank 1: ValueError: a"


def test_a_kill_for_want_of_memory_is_no_loss_that_another_attempt_mends() -> None:
    fallen = [Fallen(0, -9), Fallen(3, -9)]
    assert root_cause(fallen) == ("ranks 0, 3 were killed by SIGKILL", True)
    assert root_cause(fallen, out_of_memory=True) == (
        "ranks 0, 3 were killed by SIGKILL; the kernel was out of memory",
        False,
    )


def test_a_rank_that_goes_on_while_all_others_give_up_hangs() -> None:
    given_up = [Fallen(0, 1, BROKEN[0], 2), Fallen(2, 1, BROKEN[1], 1)]
    assert root_cause(given_up, [1]) == (f"rank 1 was hanging; what rank 2 says: {BROKEN[1]}", True)
    assert root_cause([*given_up, Fallen(1, 0, "ValueError: a", 3)], [1]) == ("rank 1: ValueError: a", False)


def test_an_exit_without_a_word() -> None:
    assert root_cause([Fallen(2, 3)]) == ("rank 2 exited with 3", False)


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
