"""Models as transformers 5 writes them, and what it makes of them: ``python -m tests.support.v5``, under 5.24, wrote it
all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qwen_cl.models.architecture import read_architecture
from qwen_cl.models.weight_mapping import expected_shapes

HERE = Path(__file__).parent
NAMES = ("qwen2", "llama", "mistral", "qwen3")
ROWS = HERE.parent / "few/instructions"
"""Training and validation rows; the losses are of the latter."""
RIGHT = HERE / "right.json"


def write_model(name: str, directory: Path) -> Path:
    """The files of a fixture, with weights from a seed: every one random, so that none left out goes unnoticed."""
    shutil.copytree(HERE / name, directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    random = np.random.RandomState(len(name))  # of all of numpy's, the one whose numbers never change
    tensors = {}
    for tensor, shape in sorted(expected_shapes(read_architecture(config, directory)).items()):
        centre = 1.0 if "norm" in tensor else 0.0
        tensors[tensor] = (centre + 0.2 * random.standard_normal(shape)).astype(np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def right_values() -> dict[str, Any]:
    """By fixture: ``validation``, the loss of the answers in ``ROWS``, which are so many ``tokens``; the ids of all
    ``special`` tokens, the ``ids`` of TEXTS, and how the model writes on after the first of them (``continued``)."""
    right: dict[str, Any] = json.loads(RIGHT.read_text(encoding="utf-8"))
    return right
