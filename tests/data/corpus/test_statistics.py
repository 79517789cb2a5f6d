"""The data report of a corpus agrees with counts made by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qwen_cl.config.task.training import LossOn
from qwen_cl.data.corpus import statistics as corpus_report
from qwen_cl.data.corpus.statistics import describe_corpus
from qwen_cl.data.corpus.text_dataset import TextTarget
from qwen_cl.data.overlap import Overlap
from qwen_cl.data.rows import Text
from qwen_cl.data.statistics import DataReport, SequenceLayout
from qwen_cl.data.statistics_text import report_page, summary
from qwen_cl.data.unicode_scripts import writing_system
from tests.data.test_datamodule import demo_rows
from tests.support.building import built, expected_ids, tokenizer
from tests.support.corpora import json_lines

ENGLISH = "Nothing of this is Japanese. " * 30
OWN = [row.text for row in demo_rows("text")[:30] if isinstance(row, Text)]
TEXTS = [*OWN, OWN[3], "短い", ENGLISH, OWN[3] + "。"]
LENGTH = 64


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TextTarget:
    directory = tmp_path_factory.mktemp("corpus")
    for name, texts in (("train", TEXTS), ("validation", ["別の話。"])):
        (directory / f"{name}.jsonl").write_bytes(json_lines(texts))
    train, validation = (built(directory / f"{name}.jsonl", directory / "cache") for name in ("train", "validation"))
    return TextTarget(train=train, validation=validation, validation_share=0.5, seed=1)


def described(target: TextTarget) -> DataReport:
    layout = SequenceLayout(sequence_length=LENGTH, micro_batch_size=4, seed=5, loss_on=LossOn.all, packing=False)
    return describe_corpus(target, tokenizer(), layout, Overlap(1, 0, 0, None), {"old": Overlap(3, 1, 1, (0, 2))})


def test_documents_are_counted(target: TextTarget) -> None:
    found = described(target)
    lengths = sorted(len(expected_ids(text)) for text in TEXTS)
    assert (found.documents, found.rows, found.tokens) == (True, len(TEXTS), sum(lengths))
    assert found.labels == found.tokens
    assert found.sequences == {"packed": -(-sum(lengths) // LENGTH)}
    assert found.duplicates == 1
    assert found.lengths["min"] == lengths[0]
    assert found.lengths["median"] == lengths[-(-len(lengths) // 2) - 1]
    assert found.lengths["max"] == lengths[-1]
    for first, last, count in found.histogram:
        assert count == sum(first <= length <= last for length in lengths)
    assert sum(count for _, _, count in found.histogram) == len(TEXTS)


def shares(texts: list[str]) -> dict[str, float]:
    counts = Counter(writing_system(character) for text in texts for character in text if not character.isspace())
    return {system: count / counts.total() for system, count in counts.items()}


def test_characters_are_those_of_the_texts(target: TextTarget) -> None:
    found = described(target)
    assert found.sampled is None
    assert {name: share for name, share in found.writing.items() if share} == pytest.approx(shares(TEXTS))
    assert found.writing["latin"] > 0.05
    assert found.writing["hiragana"] > 0.2


def test_of_a_large_corpus_a_sample_is_counted_and_said_to_be_one(
    target: TextTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = described(target)
    monkeypatch.setattr(corpus_report, "SAMPLE", whole.tokens * 2 // 3)
    found = described(target)
    number = len(TEXTS) * (whole.tokens * 2 // 3) // whole.tokens
    assert found.sampled == number
    chosen = np.linspace(0, len(TEXTS) - 1, number).round().astype(int)
    most = 4 * (whole.tokens * 2 // 3) // number
    parts = [tokenizer().decode(expected_ids(TEXTS[place])[:-1][:most]) for place in chosen]
    assert {name: share for name, share in found.writing.items() if share} == pytest.approx(shares(parts))
    assert f"characters of a sample of {number} documents: hiragana " in summary(found)[2][1]
    counted = (found.tokens, found.histogram, found.duplicates, found.rendered)
    assert counted == (whole.tokens, whole.histogram, whole.duplicates, whole.rendered)


def test_ten_documents_are_shown_from_their_start(target: TextTarget) -> None:
    found = described(target)
    places = np.linspace(0, len(TEXTS) - 1, 10).round().astype(int)
    assert len(found.rendered) == 10
    for place, text in zip(places, found.rendered, strict=True):
        ids = expected_ids(TEXTS[place])[:-1]
        more = f" … and {len(ids) - 400:,} more tokens" if len(ids) > 400 else ""
        assert text == tokenizer().decode(ids[:400]) + more
    page = report_page(found)
    assert "\nDocuments, from their start:\n" in page
    assert "\nTokens per document: min " in page
    assert all(text in page for text in found.rendered)
    assert "1 duplicates; 2 of 3 rows of retention.eval_sets.old are trained on" in page


def test_only_what_trains_is_described(target: TextTarget, tmp_path: Path) -> None:
    held_out = TextTarget(train=target.train, validation=None, validation_share=0.5, seed=3)
    trained, _ = held_out.split()
    found = described(held_out)
    assert found.rows == len(trained.documents) == len(TEXTS) // 2
    assert found.tokens == sum(len(expected_ids(TEXTS[number])) for number in trained.documents)
