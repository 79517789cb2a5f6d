"""Causal attention of rows that are spread over the context parallel ranks, exact and by torch's own kernels.

Megatron deals each row out in 2 x context_parallel pieces, of which rank r has number r and its mirror image: attention
is causal, so all then have as much to do. Queries stay where they are; keys and values of the whole row are gathered
(their gradients scattered again), which costs memory for one layer's keys and values and no further passes. For the
ring of arXiv 2310.01889, which never holds them whole, Megatron needs Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of (batch, heads, positions, width); the last query is at the last key."""


def attend_across_ranks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor | None, attend: Attend
) -> torch.Tensor:
    """Shapes: (positions of this rank, batch, heads, width); ``segments`` are those of the whole rows."""
    key, value = whole_rows(key), whole_rows(value)
    batch, length, size = query.shape[1], key.shape[0], query.shape[0] // 2
    starts = list(range(0, batch * length + 1, length)) if segments is None else sorted(set(segments.tolist()))
    out = torch.empty_like(query)
    for half, piece in enumerate(_own_pieces()):
        for row, keys, queries in _overlaps(starts, length, piece * size, size):
            own = slice(half * size + queries.start, half * size + queries.stop)
            found = attend(*(_of_row(tensor, row, part) for tensor, part in ((query, own), (key, keys), (value, keys))))
            out[own, row] = found[0].transpose(0, 1)
    return out


def whole_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Of pieces along the first dimension, in the order of the rows."""
    size = parallel_state.get_context_parallel_world_size()
    gathered = gather_from_sequence_parallel_region(tensor, group=parallel_state.get_context_parallel_group())
    pieces = gathered.chunk(2 * size)  # by rank
    return torch.cat([pieces[2 * piece if piece < size else 2 * (2 * size - piece) - 1] for piece in range(2 * size)])


def _own_pieces() -> tuple[int, int]:
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return rank, 2 * size - 1 - rank


def _overlaps(starts: list[int], length: int, first: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Of each segment that reaches into the positions from ``first`` on: its row, the keys that its queries there see,
    and where those queries are, from ``first``."""
    for start, stop in pairwise(starts):
        row, begin = divmod(start, length)
        end = min(begin + stop - start, first + size)
        since = max(begin, first)
        if since < end:
            yield row, slice(begin, end), slice(since - first, end - first)


def _of_row(tensor: torch.Tensor, row: int, part: slice) -> torch.Tensor:
    """Shape (1, heads, positions, width)."""
    return tensor[part, row].transpose(0, 1)[None]
