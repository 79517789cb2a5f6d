"""Reader of Megatron's indexed datasets without torch, for the launcher. Format: megatron-core's
``datasets/indexed_dataset.py``."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER = struct.Struct("<9sQBQQ")
"""Fields: magic, version, code of the dtype, number of sequences, number of document bounds."""
MAGIC = b"MMIDIDX\x00\x00"
INTEGERS: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


def read_ids(prefix: str) -> npt.NDArray[Any]:
    """Return all ids of the dataset, memory-mapped."""
    _, _, code, _, _ = _header(prefix)
    return np.memmap(f"{prefix}.bin", dtype=INTEGERS[code], mode="r")


def read_bounds(prefix: str) -> npt.NDArray[np.int64]:
    """Return the start of each document, in ids, and the end of the last."""
    _, _, _, sequences, documents = _header(prefix)
    index = Path(f"{prefix}.idx")
    lengths = np.fromfile(index, dtype=np.int32, count=sequences, offset=HEADER.size)
    pointers_end = HEADER.size + sequences * (4 + 8)
    bounds = np.fromfile(index, dtype=np.int64, count=documents, offset=pointers_end)
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[bounds]


def _header(prefix: str) -> tuple[Any, ...]:
    with Path(f"{prefix}.idx").open("rb") as stream:
        return HEADER.unpack(stream.read(HEADER.size))
