"""Tells whether a model directory is still the one a run was trained from. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen_cl.models.formats.nemo_layout import CONTEXT, MODEL, WEIGHTS, is_nemo_checkpoint
from qwen_cl.models.formats.tensor_files import weight_files
from qwen_cl.models.formats.torch_dist_metadata import METADATA

SAMPLES, SAMPLE_BYTES = 16, 2**16


def fingerprint(directory: Path) -> str:
    """sha256 over config.json (of a NeMo checkpoint, over what describes it) and, of each weight file, its name, size,
    head and evenly spaced samples.

    Reads 1 MiB a file where a full hash would read them whole: other weights of the same shapes show, a single
    flipped bit does not.
    """
    if is_nemo_checkpoint(directory):
        described = [directory / CONTEXT / MODEL, directory / WEIGHTS / METADATA]
        weights = list((directory / WEIGHTS).glob("*.distcp"))
    else:
        described, weights = [directory / "config.json"], weight_files(directory)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in described))
    for path in sorted(weights):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for number in range(SAMPLES):
                stream.seek(size * number // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
