"""The probe of a family that is only one more entry of ``FAMILIES``: it saves logits."""

from __future__ import annotations

from pathlib import Path

from qwen_cl.models.families import FAMILIES, Family, SlidingWindow
from tests.support import layout_probe

MINISTRAL = Family(
    model_type="ministral",
    title="Ministral",
    transformers="Ministral",
    nemo_model="MistralModel",
    nemo_config="MistralConfig7B",
    nemo_window=True,
    sliding_window=SlidingWindow(by_layer=True),
)
"""A family with Mistral's layers, some of which have a window; it is not supported otherwise."""


def main(out: Path, tensor_parallel: int, pipeline_parallel: int, directories: list[Path]) -> None:
    FAMILIES[MINISTRAL.model_type] = MINISTRAL
    layout_probe.main(out, tensor_parallel, pipeline_parallel, directories)
