"""The hash of a file's content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK = 2**20


def hash_file(path: Path, digest: _Hash | None = None, on_read: Callable[[int], Any] | None = None) -> str:
    """Return the sha256 of a file, or ``digest`` with the file's bytes added to it; ``on_read`` is called with the size
    of each block."""
    digest = hashlib.sha256() if digest is None else digest
    block = bytearray(BLOCK)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(memoryview(block)[:count])
            if on_read is not None:
                on_read(count)
    return digest.hexdigest()
