"""Tells whether a model directory is still the one a run was trained from. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen_cl.source.checkpoint import weight_files

SAMPLES, SAMPLE_BYTES = 16, 2**16


def fingerprint(directory: Path) -> str:
    """sha256 over config.json and, of each weight file, its name, size, head and evenly spaced samples.

    Reads 1 MiB a file where a full hash would read them whole: other weights of the same shapes show, a single
    flipped bit does not.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(weight_files(directory)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for number in range(SAMPLES):
                stream.seek(size * number // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
