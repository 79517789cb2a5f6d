"""Raw text, and text that the model writes itself: prepared once, held out by document, mixed in its share."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from qwen_cl.config.errors import UserError
from qwen_cl.config.replay import FileReplayConfig, GeneratedReplayConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.config.task.continual import StageConfig
from qwen_cl.continual.stage_state import is_finished, record_stage
from qwen_cl.continual.stages import Stage
from qwen_cl.data.corpus.split import split_documents
from qwen_cl.data.corpus.text_dataset import TextTarget
from qwen_cl.data.examples import Example
from qwen_cl.data.mixing import Mixture
from qwen_cl.inference.self_replay import sampled_file, with_sampled_text
from qwen_cl.planning.plan import make_plan
from qwen_cl.runs.folder import RunFolder
from tests.conftest import Launched, launch, launch_once
from tests.support.composed_configs import compose_run
from tests.support.models import save_random_model
from tests.support.reference_loss import Reference
from tests.training.test_forgetting import demo_rows

pytestmark = pytest.mark.slow

LENGTH, STEPS, BATCH, SEED, SHARE = 64, 4, 4, 5, 0.25
DOCUMENTS = 20
REPLAY = ["replay=generated", "replay.ratio=0.4", "replay.tokens=400", "replay.max_length=32", "replay.batch_size=8"]


def write_corpus(path: Path) -> list[str]:
    """Two documents stand in it twice: one of them validates, its copy trains."""
    texts = [row["text"] for row in demo_rows("text.train.jsonl", DOCUMENTS)]
    trained, measured = split_documents(DOCUMENTS, share=SHARE, seed=SEED)
    texts[trained[0]] = texts[measured[1]]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return texts


@dataclass(frozen=True)
class TextRun:
    run: Launched
    command: list[str]
    texts: list[str]
    reference: Reference

    @property
    def config(self) -> RunConfig:
        register_schemas()
        return load_config(self.run.folder.config)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run.folder.metrics_file.read_text().splitlines()]

    @property
    def sampled(self) -> Path:
        assert isinstance(self.config.replay, FileReplayConfig)
        return Path(self.config.replay.datasets["generated"])

    def before_sampling(self) -> tuple[RunConfig, GeneratedReplayConfig]:
        """Settled as the run's own, but with the replay that was asked for."""
        asked = compose_run(*self.command).replay
        assert isinstance(asked, GeneratedReplayConfig)
        return replace(self.config, replay=asked), asked


@pytest.fixture(scope="module")
def text_run(shared_directory: Path) -> TextRun:
    place = shared_directory / "text-inputs"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            place.mkdir()
            save_random_model(place / "model", heads=2, kv_groups=1, layers=2, vocab_size=1537, tied=True)
            write_corpus(place / "texts.jsonl.gz")
    with gzip.open(place / "texts.jsonl.gz", "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    command = [
        "task=pretrain",
        "model=local",
        f"model.source={place / 'model'}",
        "peft=none",
        "data=text",
        f"data.path={place / 'texts.jsonl.gz'}",
        f"data.validation_fraction={SHARE}",
        "data.workers=1",
        *REPLAY,
    ]
    command += ["retention=none", "cluster.accelerator=cpu", "wandb.mode=disabled", f"seed={SEED}", "lr=1e-3"]
    command += [f"task.max_steps={STEPS}", f"task.global_batch_size={BATCH}", "task.micro_batch_size=2"]
    command += [f"task.sequence_length={LENGTH}", "task.lr_schedule=constant", "task.warmup_steps=1"]
    run = launch_once(shared_directory, "text", *command, "data.allow_overlap=true", warm=True)
    assert run.returncode == 0, run.stderr + run.stdout
    return TextRun(run, command, texts, Reference.load(place / "model"))


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """The rule of split_documents, spelled out: the documents with the smallest numbers validate."""
    numbers = np.random.PCG64(SEED).random_raw(len(texts))
    smallest = set(np.argsort(numbers)[: round(SHARE * len(texts))].tolist())
    return [text for number, text in enumerate(texts) if number not in smallest], [
        text for number, text in enumerate(texts) if number in smallest
    ]


def test_it_is_measured_on_the_documents_held_out(text_run: TextRun) -> None:
    _, measured = split(text_run.texts)
    assert len(measured) == 5
    sequences = text_run.reference.text_sequences(measured, LENGTH)
    (first,) = (record for record in text_run.records if record["step"] == 0)
    assert first["val/target/tokens"] == sum(len(ids) - 1 for ids in sequences)
    assert first["val/target/loss"] == pytest.approx(text_run.reference.loss(sequences), abs=1e-4)
    num_bytes = sum(len(text.encode()) for text in measured)
    expected = text_run.reference.bits_per_byte(sequences, num_bytes)
    assert first["val/target/bits_per_byte"] == pytest.approx(expected, abs=1e-4)
    assert not any(key.startswith("retention/") for record in text_run.records for key in record)


def test_it_trains_on_the_other_documents_and_on_what_the_model_wrote(text_run: TextRun) -> None:
    trained, _ = split(text_run.texts)
    written = [json.loads(line)["text"] for line in text_run.sampled.read_text(encoding="utf-8").splitlines()]
    sets = [
        [Example(ids, ((1, len(ids)),)) for ids in text_run.reference.text_sequences(texts, LENGTH)]
        for texts in (trained, written)
    ]
    mixture = Mixture(sets, [0.6, 0.4], num_samples=STEPS * BATCH, seed=SEED)
    for step in range(1, STEPS + 1):
        seen = range((step - 1) * BATCH, step * BATCH)
        (tokens,) = (record["tokens"] for record in text_run.records if record["step"] == step and "tokens" in record)
        assert tokens == sum(mixture[index].num_labels for index in range(step * BATCH))
        if step == 1:
            assert {mixture.place(index)[0] for index in seen} == {0, 1}
            expected = text_run.reference.loss([mixture[index].ids for index in seen])
            (loss,) = (record["train/loss"] for record in text_run.records if record.get("tokens") == tokens)
            assert loss == pytest.approx(expected, abs=1e-4)
    replayed = sum(mixture[index].num_labels for index in range(len(mixture)) if mixture.place(index)[0] == 1)
    everything = sum(mixture[index].num_labels for index in range(len(mixture)))
    assert abs(replayed - 0.4 * everything) <= LENGTH


def test_a_constant_learning_rate_stays_where_it_was_warmed_up_to(text_run: TextRun) -> None:
    used = [record["optim/lr"] for record in text_run.records if "optim/lr" in record]
    assert used == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3], rel=1e-6)


def test_its_command_and_its_data_are_recorded(text_run: TextRun) -> None:
    trained, measured = split(text_run.texts)
    counts = [sum(len(text_run.reference.ids(text)) + 1 for text in texts) for texts in (trained, measured)]
    assert f"{'training set':>18}  15 documents, {counts[0]:,} tokens, " in text_run.run.stdout
    assert f"5 documents of {counts[1]:,} tokens validate\n" in text_run.run.stdout
    report = json.loads(text_run.run.folder.data_report_json.read_text(encoding="utf-8"))
    assert (report["rows"], report["tokens"]) == (15, counts[0])
    assert report["overlap"] == {"texts": 5, "exact": 1, "by_grams": 0, "first": [1, 0]}
    page = text_run.run.folder.data_report.read_text(encoding="utf-8")
    assert "1 of 5 validation documents are also in the training set" in page
    assert page.count("\n--- ") == 10
    plain = json.loads(text_run.run.folder.text_target.read_text(encoding="utf-8"))
    assert text_run.run.folder.status().data_sha256 == TextTarget.parse(plain).content
    assert text_run.config.replay == FileReplayConfig(
        ratio=0.4, datasets={"generated": str(text_run.sampled)}, weights={}
    )


def test_text_is_sampled_once(text_run: TextRun, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in text_run.sampled.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 5
    assert all(list(row) == ["text"] and len(row["text"].strip()) >= 20 for row in rows)
    assert "sampling text to replay: 400 of 400 tokens" in text_run.run.stdout
    config, replay = text_run.before_sampling()
    before = text_run.sampled.stat().st_mtime_ns
    assert with_sampled_text(config, replay).replay == text_run.config.replay
    assert text_run.sampled.stat().st_mtime_ns == before
    assert "sampling" not in capfd.readouterr().out


def test_text_sampled_another_way_is_another_file(text_run: TextRun) -> None:
    config, replay = text_run.before_sampling()
    assert sampled_file(config, replay) == text_run.sampled
    others = [
        sampled_file(replace(config, seed=SEED + 1), replay),
        sampled_file(config, replace(replay, temperature=0.9)),
        sampled_file(config, replace(replay, tokens=401)),
        sampled_file(config, replace(replay, max_length=33)),
        sampled_file(config, replace(replay, top_p=0.5)),
        sampled_file(replace(config, model=replace(config.model, source=f"hf://org/name@{'a' * 40}")), replay),
    ]
    assert len({text_run.sampled, *others}) == 7
    assert sampled_file(config, replace(replay, ratio=0.1)) == text_run.sampled


def test_a_cache_that_cannot_be_made_is_refused(
    text_run: TextRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN_CL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"/file/replay cannot be created: .*; set QWEN_CL_CACHE to another folder$"):
        with_sampled_text(*text_run.before_sampling())


def test_documents_that_validate_and_train_are_refused(text_run: TextRun, tmp_path: Path) -> None:
    trained, measured = split_documents(DOCUMENTS, share=SHARE, seed=SEED)
    path = text_run.command[5].removeprefix("data.path=")
    done = launch(*text_run.command, directory=tmp_path / "outputs/run")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"{path}:{measured[1] + 1}: this document, held out by data.validation_fraction (0.25), is in the training "
        f"text too ({path}:{trained[0] + 1}), as are 1 of 5 (1 identical, 0 with more than half of their 13-grams); "
        "their loss would measure what is memorized: remove them from the text, or write data.allow_overlap=true"
    )
    assert not (tmp_path / "outputs/run").exists()


def test_a_finished_stage_of_raw_text_is_known_again_until_the_text_is_another(
    text_run: TextRun, tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl.gz"
    path.write_bytes(Path(text_run.command[5].removeprefix("data.path=")).read_bytes())
    config = compose_run(*text_run.command[:5], f"data.path={path}", *text_run.command[6:])
    said = StageConfig(name="text", init_from=None, overrides=[], eval_sets=[])
    stage = Stage(1, said, None, RunFolder(tmp_path / "stage"), [], config, make_plan(config))
    record_stage(stage)
    shutil.copyfile(text_run.run.folder.status_file, stage.folder.status_file)
    assert is_finished(stage)
    path.write_bytes(gzip.compress(b'{"text": "another"}\n', mtime=0))
    with pytest.raises(UserError, match="stage text completed with other settings: the content of its data; use"):
        is_finished(stage)


def test_a_dry_run_tokenizes_nothing(text_run: TextRun, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = launch(
        *text_run.command,
        "dry_run=true",
        directory=tmp_path / "run",
        environment={"QWEN_CL_CACHE": str(cache)},
        warm=True,
    )
    assert done.returncode == 0, done.stderr
    assert "target='tokenized when the run starts'" in done.stdout
    assert not cache.exists()
    assert not (tmp_path / "run").exists()
