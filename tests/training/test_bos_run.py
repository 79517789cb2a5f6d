"""A Llama whose tokenizer adds BOS, trained on raw text and measured, in real processes: the losses of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_cl.config.replay import FileReplayConfig
from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.data.corpus.split import split_documents
from qwen_cl.data.examples import Example, build_examples
from qwen_cl.data.mixing import Mixture
from qwen_cl.data.rows import Text
from tests.conftest import Launched, launch, launch_once
from tests.data.test_raw_text import expected_examples
from tests.support.bos_tokenizers import BOS_ID, EOS_ID, save_tokenizer
from tests.support.corpora import json_lines
from tests.support.models import save_random_model
from tests.training.test_forgetting import demo_rows

pytestmark = pytest.mark.slow

LENGTH, SHARE, SEED, BATCH, DOCUMENTS = 64, 0.25, 5, 8, 20


@dataclass(frozen=True)
class Trained:
    run: Launched
    place: Path
    texts: list[str]
    model: Any
    tokenizer: Any

    def nats(self, texts: list[str]) -> tuple[float, int]:
        """Return the loss and number of tokens of sequences that are cut without the code tested."""
        total, count = 0.0, 0
        for ids, labels in expected_examples(self.tokenizer, texts, LENGTH):
            number = sum(label != -100 for label in labels[1:])
            with torch.no_grad():
                loss = self.model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
            total, count = total + float(loss) * number, count + number
        return total, count

    def record(self, step: int, key: str) -> dict[str, Any]:
        lines = map(json.loads, self.run.folder.metrics_file.read_text(encoding="utf-8").splitlines())
        return next(line for line in lines if line["step"] == step and key in line)


@pytest.fixture(scope="module")
def trained(shared_directory: Path) -> Trained:
    place, texts = shared_directory / "bos-inputs", [row["text"] for row in demo_rows("text.train.jsonl", DOCUMENTS)]
    texts[3] = "<s>It begins with BOS</s>, spelt out. " + texts[3]
    with FileLock(f"{place}.lock"):
        if not place.exists():
            tokenizer = save_tokenizer(place / "tokenizer", "byte level")
            save_random_model(
                place / "model", family="llama", vocab_size=len(tokenizer), bos_token_id=BOS_ID, eos_token_id=EOS_ID
            )
            tokenizer.save_pretrained(place / "model")
            (place / "texts.jsonl").write_bytes(json_lines(texts))
            (place / "kept.jsonl").write_bytes(json_lines(texts[:5]))
    command = ["task=pretrain", "model=local", f"model.source={place / 'model'}", "peft=none", "data=text"]
    command += [f"data.path={place / 'texts.jsonl'}", f"data.validation_fraction={SHARE}", "data.workers=1"]
    command += ["retention=files", f"retention.eval_sets={{kept: '{place / 'kept.jsonl'}'}}", "data.allow_overlap=true"]
    command += ["replay=generated", "replay.ratio=0.4", "replay.tokens=300", "replay.max_length=32"]
    command += ["cluster.accelerator=cpu", "wandb.mode=disabled", f"seed={SEED}", "task.max_steps=1"]
    command += [f"task.global_batch_size={BATCH}", "task.micro_batch_size=2", f"task.sequence_length={LENGTH}"]
    run = launch_once(shared_directory, "bos", *command, "task.warmup_steps=0", warm=True)
    assert run.returncode == 0, run.stderr + run.stdout
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    return Trained(run, place, texts, model, AutoTokenizer.from_pretrained(place / "model"))


def test_validation_and_retention_have_the_loss_of_texts_after_bos(trained: Trained) -> None:
    _, measured = split_documents(DOCUMENTS, share=SHARE, seed=SEED)
    first = trained.record(0, "val/target/loss")
    for name, texts in (
        ("val/target", [trained.texts[number] for number in measured]),
        ("retention/kept", trained.texts[:5]),
    ):
        nats, count = trained.nats(texts)
        assert first[f"{name}/tokens"] == count
        assert first[f"{name}/loss"] == pytest.approx(nats / count, abs=1e-4)
        num_bytes = sum(len(text.encode()) for text in texts)
        expected = nats / torch.log(torch.tensor(2.0)).item() / num_bytes
        assert first[f"{name}/bits_per_byte"] == pytest.approx(expected, abs=1e-4)


def test_it_trains_on_texts_after_bos_and_on_what_was_sampled_after_bos(trained: Trained) -> None:
    register_schemas()
    replay = load_config(trained.run.folder.config).replay
    assert isinstance(replay, FileReplayConfig)
    lines = Path(replay.datasets["generated"]).read_text(encoding="utf-8").splitlines()
    texts, _ = split_documents(DOCUMENTS, share=SHARE, seed=SEED)
    sets = [
        [_example(*pair) for pair in expected_examples(trained.tokenizer, documents, LENGTH)]
        for documents in ([trained.texts[number] for number in texts], [json.loads(line)["text"] for line in lines])
    ]
    mixture = Mixture(sets, [0.6, 0.4], num_samples=BATCH, seed=SEED)
    total, count = 0.0, 0
    for index in range(BATCH):
        labels = [-100] * len(mixture[index].ids)
        for start, stop in mixture[index].loss_spans:
            labels[start:stop] = mixture[index].ids[start:stop]
        with torch.no_grad():
            loss = trained.model(torch.tensor([mixture[index].ids]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * mixture[index].num_labels, count + mixture[index].num_labels
    found = trained.record(1, "train/loss")
    assert BOS_ID in [token for index in range(BATCH) for token in mixture[index].ids[1:]]
    assert found["tokens"] == sum(mixture[index].num_positions for index in range(BATCH))  # that were read
    assert found["train/loss"] == pytest.approx(total / count, abs=1e-4)


def test_samples_begin_with_bos(trained: Trained) -> None:
    lines = [json.loads(line) for line in trained.run.folder.samples.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 6
    assert all(line["prompt"].startswith("<s>") and "<s>" not in line["prompt"][3:] for line in lines)


def test_evaluate_says_the_same_as_retention(trained: Trained, tmp_path: Path) -> None:
    command = ["task=evaluate", "model=local", f"model.source={trained.place / 'model'}", "cluster.accelerator=cpu"]
    command += [f"task.sets={{kept: '{trained.place / 'kept.jsonl'}'}}", f"task.sequence_length={LENGTH}"]
    done = launch(*command, f"task.output={tmp_path / 'out.json'}", directory=tmp_path / "run", warm=True)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["sets"]["kept"]
    nats, count = trained.nats(trained.texts[:5])
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(nats / count, abs=1e-4)


def test_the_example_builder_cuts_them_so_too(trained: Trained) -> None:
    rows = [Text(text) for text in trained.texts]
    examples = list(build_examples(rows, trained.tokenizer, LENGTH))
    assert examples == [_example(*pair) for pair in expected_examples(trained.tokenizer, trained.texts, LENGTH)]


def _example(ids: list[int], labels: list[int]) -> Example:
    places = [place for place, label in enumerate(labels) if label != -100]
    spans: list[tuple[int, int]] = []
    for place in places:
        if spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return Example(ids, tuple(spans))
