"""The fingerprint of a model directory, to detect a changed base model. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen_cl.models.formats.nemo_layout import CONTEXT, MODEL, WEIGHTS, is_nemo_checkpoint
from qwen_cl.models.formats.tensor_files import weight_files
from qwen_cl.models.formats.torch_dist_metadata import METADATA

SAMPLES, SAMPLE_BYTES = 16, 2**16


def fingerprint(directory: Path) -> str:
    """Return the sha256 over config.json (for a NeMo checkpoint, its model.yaml) and, for each weight file, its name,
    size, header and evenly spaced samples.

    Only 1 MiB of each file is read, so it detects other weights of the same shapes, but not a single flipped bit.
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
