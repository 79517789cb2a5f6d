"""A run sees its datasets in the right order and proportion."""

from __future__ import annotations

import pytest

from qwen_cl.data.examples import Example
from qwen_cl.data.mixing import Mixture


def examples(set_number: int, lengths: list[int]) -> list[Example]:
    """Told apart by their first two ids, with so many labels."""
    return [Example([set_number, number, *[0] * length], ((2, 2 + length),)) for number, length in enumerate(lengths)]


def test_order_is_a_new_permutation_every_epoch_and_follows_the_seed() -> None:
    def order(seed: int, indices: range = range(150)) -> list[int]:
        mixture = Mixture([examples(0, [1] * 50)], [1.0], num_samples=150, seed=seed)
        assert len(mixture) == 150
        return [mixture[index].ids[1] for index in indices]

    first = order(1)
    epochs = [first[:50], first[50:100], first[100:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert list(range(50)) not in epochs
    assert order(1) == first
    assert order(2) != first
    assert order(1, range(73, 150)) == first[73:]  # what a resumed run sees
    assert order(1, range(149, -1, -1)) == first[::-1]


LENGTHS = {
    "equal": ([64] * 40, [64] * 7, [64] * 11),
    "short answers, long texts": ([3, 9, 1, 20, 5] * 9, [128] * 6, [40, 17, 90]),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("shares", [(0.9, 0.07, 0.03), (0.5, 0.25, 0.25), (0.99, 0.0, 0.01)])
def test_over_any_stretch_each_set_has_its_share_of_the_labels(
    lengths: tuple[list[int], ...], shares: tuple[float, ...]
) -> None:
    sets = [examples(number, list(some)) for number, some in enumerate(lengths)]
    mixture = Mixture(sets, shares, num_samples=4000, seed=3)
    seen = [mixture[index] for index in range(4000)]
    longest = max(max(some) for some in lengths)
    running = [[0] * len(sets)]
    for example in seen:
        labels = list(running[-1])
        labels[example.ids[0]] += len(example.ids) - 2
        running.append(labels)
    for start, stop in [(0, 4000), (0, 100), (17, 450), (1000, 1300), (3333, 4000), (2500, 2530)]:
        counts = [after - before for before, after in zip(running[start], running[stop])]
        for count, share in zip(counts, shares):
            # Behind by one example at each end, whichever set it is of.
            assert abs(count - share * sum(counts)) <= 2 * longest, (start, stop, counts)
    assert all(share > 0 or running[-1][number] == 0 for number, share in enumerate(shares))


def test_a_mixture_is_the_same_from_any_index_and_each_set_goes_round_by_itself() -> None:
    sets = [examples(0, [5, 9, 2, 7]), examples(1, [30] * 3)]

    def seen(indices: range) -> list[list[int]]:
        mixture = Mixture(sets, [0.6, 0.4], num_samples=200, seed=11)
        return [mixture[index].ids[:2] for index in indices]

    whole = seen(range(200))
    assert seen(range(120, 200)) == whole[120:]
    assert seen(range(199, -1, -1)) == whole[::-1]
    for number, size in enumerate((4, 3)):
        own = [position for which, position in whole if which == number]
        assert [sorted(own[start : start + size]) for start in range(0, 12, size)] == [list(range(size))] * (12 // size)
