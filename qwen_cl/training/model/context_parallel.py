"""Compute exact causal attention of sequences that are split over context parallel ranks, with torch's kernels.

Megatron splits each sequence into 2 x context_parallel pieces, of which rank r has number r and its mirror image: as
attention is causal, this balances the ranks. Queries stay local; keys and values of the whole sequence are gathered
(and their gradients scattered), which costs the memory of one layer's keys and values. For ring attention (arXiv
2310.01889), which never gathers them, Megatron needs Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention over (batch, heads, positions, width); the last query is at the last key."""


def attend_across_ranks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor | None, attend: Attend
) -> torch.Tensor:
    """Attend with this rank's queries over the whole sequences.

    Shapes: (positions of this rank, batch, heads, width); ``segments`` are those of the whole sequences.
    """
    key, value = gather_sequences(key), gather_sequences(value)
    batch, length, size = query.shape[1], key.shape[0], query.shape[0] // 2
    starts = list(range(0, batch * length + 1, length)) if segments is None else sorted(set(segments.tolist()))
    out = torch.empty_like(query)
    for half, piece in enumerate(_local_pieces()):
        for row, keys, queries in _overlaps(starts, length, piece * size, size):
            local = slice(half * size + queries.start, half * size + queries.stop)
            parts = ((query, local), (key, keys), (value, keys))
            found = attend(*(_select(tensor, row, part) for tensor, part in parts))
            out[local, row] = found[0].transpose(0, 1)
    return out


def gather_sequences(tensor: torch.Tensor) -> torch.Tensor:
    """Gather the pieces of all ranks along the first dimension, in the order of the sequence."""
    size = parallel_state.get_context_parallel_world_size()
    gathered = gather_from_sequence_parallel_region(tensor, group=parallel_state.get_context_parallel_group())
    pieces = gathered.chunk(2 * size)  # by rank
    return torch.cat([pieces[2 * piece if piece < size else 2 * (2 * size - piece) - 1] for piece in range(2 * size)])


def _local_pieces() -> tuple[int, int]:
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return rank, 2 * size - 1 - rank


def _overlaps(starts: list[int], length: int, first: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield, for each segment with positions from ``first`` on: its row, the keys to attend to, and its queries.

    The slice of the queries is relative to ``first``.
    """
    for start, stop in pairwise(starts):
        row, begin = divmod(start, length)
        end = min(begin + stop - start, first + size)
        since = max(begin, first)
        if since < end:
            yield row, slice(begin, end), slice(since - first, end - first)


def _select(tensor: torch.Tensor, row: int, part: slice) -> torch.Tensor:
    """Return a part of a row, of shape (1, heads, positions, width)."""
    return tensor[part, row].transpose(0, 1)[None]
