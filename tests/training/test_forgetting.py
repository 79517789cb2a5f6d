"""A run that replays old data and measures what it forgets: on two ranks, against transformers."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from qwen_cl.data.examples import Example
from qwen_cl.data.mixing import Mixture
from tests.conftest import ROOT, Launched, launch_once
from tests.support.models import save_random_model
from tests.support.reference_loss import Reference

pytestmark = pytest.mark.slow

DATA = ROOT / "qwen_cl/demo/data"
LENGTH, STEPS, BATCH, SEED = 64, 10, 4, 11
LR, WARMUP, HOLD, DECAY, LEAST = 1e-3, 3, 3, 4, 0.2


def demo_rows(name: str, count: int) -> list[dict[str, str]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line) for line in lines]


ROWS: dict[str, list[dict[str, str]]] = {
    "train": demo_rows("text.train.jsonl", 12),
    "validation": demo_rows("text.validation.jsonl", 5),
    "old-english": demo_rows("replay-english.train.jsonl", 8),
    "old-chat": demo_rows("instructions.train.jsonl", 9),
    "english": demo_rows("retention-english.jsonl", 5),
    "chat": demo_rows("instructions.validation.jsonl", 7),
}
EVALUATED = {"val/target": "validation", "retention/english": "english", "retention/chat": "chat"}


@dataclass(frozen=True)
class Forgetting:
    run: Launched
    reference: Reference
    records: list[dict[str, Any]]

    def sequences(self, name: str) -> list[list[int]]:
        if "prompt" in ROWS[name][0]:
            return self.reference.chat_sequences(ROWS[name], LENGTH)
        return self.reference.text_sequences((row["text"] for row in ROWS[name]), LENGTH)

    def at(self, step: int, key: str) -> float:
        (value,) = (record[key] for record in self.records if record["step"] == step and key in record)
        return float(value)

    def mixture(self) -> Mixture:
        """Three fifths new; of the rest three quarters English and one chat."""
        sets = [
            [Example(ids, ((1, len(ids)),)) for ids in self.sequences(name)]
            for name in ("train", "old-english", "old-chat")
        ]
        return Mixture(sets, [0.6, 0.3, 0.1], num_samples=STEPS * BATCH, seed=SEED)


@pytest.fixture(scope="module")
def forgetting(shared_directory: Path) -> Forgetting:
    place = shared_directory / "forgetting-inputs"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            place.mkdir()
            save_random_model(place / "model", heads=2, kv_groups=1, layers=2, vocab_size=1537, tied=True)
            for name, rows in ROWS.items():
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    run = launch_once(
        shared_directory,
        "forgetting",
        "task=pretrain",
        "model=local",
        f"model.source={place / 'model'}",
        "peft=none",
        "data=jsonl",
        f"data.path={place / 'train.jsonl'}",
        f"data.validation_path={place / 'validation.jsonl'}",
        "replay=files",
        "replay.ratio=0.4",
        f"replay.datasets={{english: {place / 'old-english.jsonl'}, chat: {place / 'old-chat.jsonl'}}}",
        "replay.weights={english: 0.75, chat: 0.25}",
        "retention=files",
        f"retention.eval_sets={{english: {place / 'english.jsonl'}, chat: {place / 'chat.jsonl'}}}",
        "cluster.accelerator=cpu",
        "cluster.devices=2",
        "wandb.mode=disabled",
        f"seed={SEED}",
        f"lr={LR}",
        f"task.max_steps={STEPS}",
        f"task.global_batch_size={BATCH}",
        "task.micro_batch_size=2",
        f"task.sequence_length={LENGTH}",
        "task.lr_schedule=warmup_hold_decay",
        f"task.warmup_steps={WARMUP}",
        f"task.decay_ratio={DECAY / STEPS}",
        f"task.min_lr_ratio={LEAST}",
        "task.val_check_interval=4",
        warm=True,
    )
    assert run.returncode == 0, run.stderr + run.folder.log.read_text()[-3000:]
    records = [json.loads(line) for line in run.folder.metrics_file.read_text().splitlines()]
    return Forgetting(run, Reference.load(place / "model"), records)


@pytest.mark.parametrize("metric", EVALUATED)
def test_before_the_first_step_every_set_has_the_loss_that_transformers_has(
    metric: str, forgetting: Forgetting
) -> None:
    name, reference = EVALUATED[metric], forgetting.reference
    sequences = forgetting.sequences(name)
    assert len(sequences) > 2
    if "text" in ROWS[name][0]:
        num_bytes = sum(len(row["text"].encode()) for row in ROWS[name])
    else:  # what is cut off counts neither as loss nor as text
        decoded = [reference.tokenizer.decode(ids[1:], skip_special_tokens=True) for ids in sequences]
        num_bytes = sum(len(text.encode()) for text in decoded)
    assert forgetting.at(0, f"{metric}/tokens") == sum(len(ids) - 1 for ids in sequences)
    assert forgetting.at(0, f"{metric}/loss") == pytest.approx(reference.loss(sequences), abs=1e-4)
    expected = reference.bits_per_byte(sequences, num_bytes)
    assert forgetting.at(0, f"{metric}/bits_per_byte") == pytest.approx(expected, abs=1e-4)


def test_learning_and_forgetting_are_measured_at_the_same_steps(forgetting: Forgetting) -> None:
    for metric in EVALUATED:
        for unit in ("loss", "bits_per_byte"):
            measured = [record["step"] for record in forgetting.records if f"{metric}/{unit}" in record]
            assert measured == [0, 4, 8, 10]
    first, last = (forgetting.at(step, "val/target/loss") for step in (0, 10))
    assert last < first - 0.05


def test_of_two_ranks_one_writes_what_both_answer(forgetting: Forgetting) -> None:
    """Check raw text, which is continued from its first half or its first 32 tokens."""
    tokenizer = forgetting.reference.tokenizer
    lines = [json.loads(line) for line in forgetting.run.folder.samples.read_text(encoding="utf-8").splitlines()]
    asked = [ids[: min(32, len(ids) // 2)] for ids in forgetting.sequences("validation")[:3]]
    assert [line["step"] for line in lines] == [0] * len(asked) + [STEPS] * len(asked)
    assert [line["prompt"] for line in lines] == [tokenizer.decode(ids) for ids in [*asked, *asked]]


def test_the_first_step_is_of_the_mixture(forgetting: Forgetting) -> None:
    mixture = forgetting.mixture()
    seen = [mixture[index] for index in range(BATCH)]
    assert len({mixture.place(index)[0] for index in range(BATCH)}) > 1
    expected = forgetting.reference.loss([example.ids for example in seen])
    assert forgetting.at(1, "train/loss") == pytest.approx(expected, abs=1e-4)
    tokens = sum(mixture[index].num_positions for index in range(len(mixture)))
    assert forgetting.at(STEPS, "tokens") == tokens


def test_a_small_model_is_compared_with_transformers_unasked(forgetting: Forgetting) -> None:
    mixture = forgetting.mixture()
    starts = [mixture[index].ids[:128] for index in range(2)]
    verified = forgetting.run.folder.status().verified
    assert verified["loss"] == pytest.approx(verified["transformers"], abs=1e-4)
    assert verified["transformers"] == pytest.approx(forgetting.reference.loss(starts), abs=1e-4)


def test_each_step_has_the_learning_rate_of_the_schedule(forgetting: Forgetting) -> None:
    """Up over the warm-up, reached in the step after it; then held; then down, to be at the least when all is done."""
    up = [LR * step / (WARMUP + 1) for step in range(1, WARMUP + 1)]
    down = [LR * (1 - (1 - LEAST) * step / DECAY) for step in range(DECAY)]
    expected = [*up, *[LR] * HOLD, *down]
    assert len(expected) == STEPS
    used = [record["optim/lr"] for record in forgetting.records if "optim/lr" in record]
    assert used == pytest.approx(expected, rel=1e-6)


def test_the_block_at_the_end_names_the_sets_and_the_picture(forgetting: Forgetting) -> None:
    for label, metric in (
        ("validation", "val/target"),
        ("retention english", "retention/english"),
        ("retention chat", "retention/chat"),
    ):
        loss, bits = (
            [forgetting.at(step, f"{metric}/{unit}") for step in (0, 10)] for unit in ("loss", "bits_per_byte")
        )
        line = (
            f"{label:>18}  loss {loss[0]:.4f} at step 0 -> {loss[1]:.4f} at step 10, "
            f"bits per byte {bits[0]:.3f} -> {bits[1]:.3f}\n"
        )
        assert line in forgetting.run.stdout
    picture = forgetting.run.folder.report
    assert f"{'plot':>18}  {picture}\n" in forgetting.run.stdout
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 < width < 3000
    assert 400 < height < 1500
    assert len(content) > 20_000
