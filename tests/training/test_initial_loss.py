"""A run starts at the loss that transformers computes for the same model and rows: nothing is lost on the way, also
where several conversations share a sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_cl.data.chat.conversations import pair
from qwen_cl.data.examples import Example, build_examples
from qwen_cl.data.mixing import Mixture
from qwen_cl.data.packing import pack_examples
from tests.conftest import ROOT, launch
from tests.support.models import save_random_model

pytestmark = pytest.mark.slow

SEQUENCE_LENGTH = 512  # several conversations
SPLIT = ["cluster.accelerator=cpu", "cluster.devices=2", "cluster.tensor_parallel=2"]
SHAPES: list[tuple[dict[str, Any], list[str]]] = [
    # Untied, an odd number of KV groups, a vocabulary that no power of two divides, several shards; every weight
    # trained, so that the fp32 masters are refreshed too.
    (
        {"heads": 9, "kv_groups": 3, "vocab_size": 1541, "tied": False, "max_shard_size": "200KB"},
        ["peft=none"],
    ),
    ({"heads": 6, "kv_groups": 2, "vocab_size": 1537, "tied": True}, ["peft=lora", "task.packing=false"]),
    # The padded row of the odd vocabulary lies on the second tensor parallel rank.
    ({"heads": 6, "kv_groups": 2, "vocab_size": 1537, "tied": True}, ["peft=lora", *SPLIT]),
    (
        {"heads": 6, "kv_groups": 2, "vocab_size": 1537, "tied": True},
        ["peft=none", *SPLIT, "speed.fused_linear_cross_entropy=always"],
    ),
]
IDS = ["untied-odd-sharded-full", "tied-lora", "tied-lora-tp2", "tied-full-tp2-by-parts-of-the-vocabulary"]


@pytest.mark.parametrize(("shape", "arguments"), SHAPES, ids=IDS)
def test_first_losses_equal_transformers(shape: dict[str, Any], arguments: list[str], tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", **shape)
    done = launch(
        "experiment=smoke",
        "model=local",
        f"model.source={model}",
        "wandb.mode=disabled",
        "task.max_steps=2",
        "seed=7",
        f"task.sequence_length={SEQUENCE_LENGTH}",
        "model.verify=logits",
        *arguments,
        directory=tmp_path / "run",
        warm=True,
    )
    assert done.returncode == 0, done.stderr + done.folder.log.read_text()[-3000:]
    records = [json.loads(line) for line in done.folder.metrics_file.read_text().splitlines()]

    validation = _examples(model, "validation")
    rows = _examples(model, "train")
    packed = "task.packing=false" not in arguments
    train = Mixture([pack_examples(rows, SEQUENCE_LENGTH) if packed else rows], [1.0], num_samples=4, seed=7)
    seen = [train[index] for index in range(4)]
    assert (max(len(example.starts) for example in seen) > 1) == packed
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    first = next(record for record in records if record["step"] == 0)
    assert first["val/target/tokens"] == sum(example.num_labels for example in validation)
    assert first["val/target/loss"] == pytest.approx(_loss(reference, validation), abs=1e-4)
    step_1 = next(record for record in records if record["step"] == 1 and "train/loss" in record)
    verified = done.folder.status().verified
    assert verified["loss"] == pytest.approx(verified["transformers"], abs=1e-4)
    assert step_1["train/loss"] == pytest.approx(_loss(reference, seen), abs=1e-4)


def _examples(model: Path, part: str) -> list[Example]:
    lines = (ROOT / f"qwen_cl/demo/data/instructions.{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [pair(**json.loads(line)) for line in lines]
    return list(build_examples(rows, AutoTokenizer.from_pretrained(model), SEQUENCE_LENGTH))


def _loss(model: Any, examples: list[Example]) -> float:
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
