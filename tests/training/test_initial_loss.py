"""A run starts at the loss that transformers computes for the same model and rows: nothing is lost on the way, also
where several conversations share a sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_cl.data.mixing import Mixture
from qwen_cl.data.packing import pack_examples
from tests.conftest import launch
from tests.support.demo_examples import SEQUENCE_LENGTH, demo_examples, mean_loss
from tests.support.models import save_random_model

pytestmark = pytest.mark.slow

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

    validation = demo_examples(model, "validation")
    rows = demo_examples(model, "train")
    packed = "task.packing=false" not in arguments
    train = Mixture([pack_examples(rows, SEQUENCE_LENGTH) if packed else rows], [1.0], num_samples=4, seed=7)
    seen = [train[index] for index in range(4)]
    assert (max(len(example.starts) for example in seen) > 1) == packed
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    first = next(record for record in records if record["step"] == 0)
    assert first["val/target/tokens"] == sum(example.num_labels for example in validation)
    assert first["val/target/loss"] == pytest.approx(mean_loss(reference, validation), abs=1e-4)
    step_1 = next(record for record in records if record["step"] == 1 and "train/loss" in record)
    verified = done.folder.status().verified
    assert verified["loss"] == pytest.approx(verified["transformers"], abs=1e-4)
    assert step_1["train/loss"] == pytest.approx(mean_loss(reference, seen), abs=1e-4)
