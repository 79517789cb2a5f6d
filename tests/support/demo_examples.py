"""The demo's rows as a model's examples, and their loss in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qwen_cl.data.chat.conversations import pair
from qwen_cl.data.examples import Example, build_examples
from tests.conftest import ROOT

SEQUENCE_LENGTH = 512  # several conversations


def demo_examples(model: Path, part: str) -> list[Example]:
    lines = (ROOT / f"qwen_cl/demo/data/instructions.{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [pair(**json.loads(line)) for line in lines]
    return list(build_examples(rows, AutoTokenizer.from_pretrained(model), SEQUENCE_LENGTH))


def mean_loss(model: Any, examples: list[Example]) -> float:
    """Mean over the labels that count, each conversation by itself and without padding."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = torch.full_like(ids, -100)
        for start, stop in example.loss_spans:
            labels[:, start:stop] = ids[:, start:stop]
        for start, stop in example.segments():
            counted = int((labels[:, start:stop] != -100).sum())
            with torch.no_grad():
                total += float(model(ids[:, start:stop], labels=labels[:, start:stop]).loss) * counted
            count += counted
    assert count == sum(example.num_labels for example in examples)
    return total / count
