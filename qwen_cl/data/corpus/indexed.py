"""Checks of a user's indexed dataset: complete, and made by this tokenizer. Needs megatron-core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.cache import Counts
from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.data.corpus.indexed_reader import HEADER, INTEGERS, MAGIC
from qwen_cl.data.raw_text import Delimiters

CHUNK = 2**24


def check_indexed(prefix: str, delimiters: Delimiters, source: TextSource) -> Counts:
    """Check an indexed dataset, reading every id once, so that a damaged file is detected before the run.

    Raises:
        UserError: it is not in Megatron's format or incomplete, a document does not end with the end-of-text token, or
            only some documents begin with the tokenizer's BOS.
    """
    where = f"{source.key} ({prefix})"
    _check_header(prefix, where)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        dataset = IndexedDataset(prefix)
    except (AssertionError, ValueError) as error:
        raise _incomplete(where) from error
    lengths, bounds = dataset.sequence_lengths.astype(np.int64), dataset.document_indices
    item = np.dtype(dataset.index.dtype).itemsize
    ends = np.cumsum(lengths)
    in_order = (
        bounds[0] == 0
        and bounds[-1] == len(lengths)
        and (np.diff(bounds) > 0).all()
        and (lengths >= 0).all()
        and (dataset.index.sequence_pointers == (ends - lengths) * item).all()
        and Path(f"{prefix}.bin").stat().st_size == ends[-1] * item
    )
    if not in_order:
        raise _incomplete(where)
    tokens = int(ends[-1])
    ids = dataset.bin_reader.read(dtype=dataset.index.dtype, count=tokens, offset=0)
    last = ids[ends[bounds[1:] - 1] - 1]
    if (others := np.flatnonzero(last != delimiters.eos_id)).size:
        raise UserError(
            f"{where}: document {others[0] + 1} ends with id {last[others[0]]}, not with this tokenizer's end-of-text "
            f"({delimiters.eos_id}); index it with this tokenizer and --append-eod, or give the text itself"
        )
    smallest, largest = _extremes(ids)
    if smallest < 0:
        raise UserError(f"{where} has a negative token id ({smallest}); index it again")
    has_bos = delimiters.bos_id is not None and _has_bos(ids, ends[bounds[1:] - 1], delimiters.bos_id, where)
    return Counts(documents=len(bounds) - 1, tokens=tokens, blank=0, largest_id=largest, has_bos=has_bos)


def _has_bos(ids: npt.NDArray[Any], stops: npt.NDArray[np.int64], bos_id: int, where: str) -> bool:
    """Return True if all documents begin with BOS, False if none does; refuse BOS elsewhere. ``stops``: their ends."""
    starts = np.concatenate(([0], stops[:-1]))
    places = np.flatnonzero(ids == bos_id)
    if not places.size:
        return False
    fix = "index it again with one BOS before each document, or with none: qwen_cl then adds it"
    without = np.flatnonzero((starts == stops) | (ids[np.minimum(starts, len(ids) - 1)] != bos_id))
    if 0 < without.size < len(starts):
        first = int(np.setdiff1d(np.arange(len(starts)), without)[0])
        raise UserError(
            f"{where}: document {first + 1} begins with this tokenizer's BOS ({bos_id}) and document {without[0] + 1} "
            f"does not; {fix}"
        )
    inner = np.setdiff1d(places, starts, assume_unique=False)
    if inner.size:
        number = int(np.searchsorted(stops, inner[0], side="right"))
        raise UserError(
            f"{where}: document {number + 1} has this tokenizer's BOS ({bos_id}) at its token "
            f"{int(inner[0] - starts[number]) + 1}, where no document begins; {fix}"
        )
    return True


def _check_header(prefix: str, where: str) -> None:
    """Check what Megatron's reader only asserts or takes for granted."""
    index = Path(f"{prefix}.idx")
    with index.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(
            f"{where}: the .idx is not an index in Megatron's format; name the prefix of a pair that Megatron wrote"
        )
    _, version, code, sequences, bounds = HEADER.unpack(header)
    if version != 1 or code not in INTEGERS:
        raise UserError(f"{where}: the .idx (version {version}, type {code}) is not one of token ids")
    if bounds < 2 or index.stat().st_size != HEADER.size + 12 * sequences + 8 * bounds:
        raise _incomplete(where)
    if Path(f"{prefix}.bin").stat().st_size == 0:
        raise _incomplete(where)


def _extremes(ids: npt.NDArray[Any]) -> tuple[int, int]:
    chunks = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
    return min(int(chunk.min()) for chunk in chunks), max(int(chunk.max()) for chunk in chunks)


def _incomplete(where: str) -> UserError:
    return UserError(f"{where}: .bin and .idx do not match, or have no document; write both again")
