"""Sequence packing: several conversations in one sequence, each attending to itself only. No torch."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from qwen_cl.data.examples import Example


def pack_examples(examples: Sequence[Example], sequence_length: int) -> list[Example]:
    """Pack examples into sequences of at most ``sequence_length`` positions, one segment per given segment.

    Attention must be restricted to each segment (qwen_cl/training/model/attention.py). Nothing is truncated. Packing
    is deterministic; packs come in the order of their first example.
    """
    sizes = [example.num_positions for example in examples]
    return [_joined([examples[index] for index in pack]) for pack in plan_packs(sizes, sequence_length)]


def plan_packs(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of each pack, ascending, by best-fit decreasing (arXiv 2404.10830, section 2)."""
    packs: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of by_space, sorted
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        place = bisect.bisect_left(spaces, sizes[index])
        if place < len(spaces):
            space = spaces[place]
            pack = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        else:
            space, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        left = space - sizes[index]
        if left not in by_space:
            bisect.insort(spaces, left)
            by_space[left] = []
        by_space[left].append(pack)
    return sorted(sorted(pack) for pack in packs)


def _joined(examples: list[Example]) -> Example:
    ids: list[int] = []
    starts: list[int] = []
    spans: list[tuple[int, int]] = []
    for example in examples:
        offset = len(ids)
        ids += example.ids
        starts += [offset + start for start in example.starts]
        spans += [(offset + start, offset + stop) for start, stop in example.loss_spans]
    return Example(ids, tuple(spans), tuple(starts))
