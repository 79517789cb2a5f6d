"""The data report agrees with counts made by hand."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest

from qwen_cl.config.task.training import LossOn
from qwen_cl.data.chat.conversations import Conversation, Message, pair
from qwen_cl.data.examples import build_examples
from qwen_cl.data.overlap import Overlap
from qwen_cl.data.packing import pack_examples
from qwen_cl.data.rows import Row, Text
from qwen_cl.data.statistics import DataReport, SequenceLayout, describe, histogram, render
from qwen_cl.data.statistics_text import report_page, summary
from qwen_cl.data.unicode_scripts import writing_shares, writing_system
from tests.conftest import Launched
from tests.data.test_datamodule import demo_rows, tokenizer, tokens


def layout(**changes: Any) -> SequenceLayout:
    common: dict[str, Any] = {"sequence_length": 1024, "micro_batch_size": 4, "seed": 5, "packing": True}
    return SequenceLayout(**{**common, "loss_on": LossOn.assistant, **changes})


def report(rows: list[Row], **changes: Any) -> DataReport:
    return describe(rows, tokenizer(), layout(**changes))


def test_rows_tokens_labels_and_lengths() -> None:
    rows = demo_rows("instructions")
    examples = list(build_examples(rows, tokenizer(), 1024))
    lengths = sorted(len(example.ids) for example in examples)
    found = report(rows)
    assert (found.documents, found.rows, found.tokens) == (False, len(rows), sum(lengths))
    assert found.labels == sum(example.num_labels for example in examples)
    assert (found.truncated, found.truncated_labels, found.without_labels, found.duplicates) == (0, 0, 0, 0)
    assert found.lengths == {
        "min": lengths[0],
        "median": lengths[-(-len(lengths) // 2) - 1],
        "p90": lengths[-(-len(lengths) * 9 // 10) - 1],
        "p99": lengths[-(-len(lengths) * 99 // 100) - 1],
        "max": lengths[-1],
    }
    assert sum(count for _, _, count in found.histogram) == len(rows)
    for first, last, count in found.histogram:
        assert count == sum(first <= length <= last for length in lengths)
    packs = pack_examples(examples, 1024)
    assert found.sequences == {"unpacked": len(rows), "packed": len(packs)}
    assert found.padding["packed"] < found.padding["unpacked"]


def test_what_is_cut_is_counted() -> None:
    """Cut in the middle of the second row's answer, and before the third's."""
    rows: list[Row] = [
        pair("一?", "はい。"),
        pair("一つ二つ三つ四つ?", "青森県、秋田県、宮城県の三県を挙げます。"),
        pair("長い" * 80, "はい。"),
    ]
    whole = list(build_examples(rows, tokenizer(), 4096))
    start, stop = whole[1].loss_spans[0]
    length = start + 3
    assert len(whole[0].ids) <= length < len(whole[2].ids)
    found = report(rows, sequence_length=length - 1)
    assert found.tokens == sum(len(example.ids) for example in whole)
    assert found.truncated == 2
    assert found.truncated_labels == (stop - start - 3) + whole[2].num_labels
    assert found.labels == whole[0].num_labels + 3
    assert found.without_labels == 1
    assert found.sequences["unpacked"] == 2
    lines = " ".join(text for _, text in summary(found))
    assert f"2 rows truncated, {found.truncated_labels} loss tokens lost; 1 left out, without loss tokens" in lines


def test_documents_are_joined_and_lose_nothing() -> None:
    rows = demo_rows("text")
    lengths = [len(tokens(row.text)) + 1 for row in rows if isinstance(row, Text)]
    found = report(rows, sequence_length=64)
    sequences = list(build_examples(rows, tokenizer(), 64))
    assert (found.documents, found.rows, found.tokens) == (True, len(rows), sum(lengths))
    assert found.labels == sum(example.num_labels for example in sequences) == sum(lengths)
    assert (found.truncated, found.truncated_labels, found.without_labels) == (0, 0, 0)
    assert found.lengths["max"] == max(lengths) > 64
    assert found.sequences == {"packed": len(sequences)}
    assert "documents" in summary(found)[0][1]


def test_duplicates_are_equal_after_normalisation() -> None:
    def asked(*contents: str) -> Conversation:
        return Conversation(tuple(Message(role, content) for role, content in zip(("user", "assistant"), contents)))

    system = Message("system", "簡潔に。")
    rows: list[Row] = [
        asked("ＡＢＣ  カタカナ", "一\n\n二"),
        asked("ABC ｶﾀｶﾅ", " 一 二"),  # full and half width, whitespace
        Conversation((system, *asked("ABC カタカナ", "一 二").messages)),
        asked("ABC カタカナ", "二 一"),
        asked("abc カタカナ", "一 二"),
    ]
    assert report(rows).duplicates == 2


@pytest.mark.parametrize(
    ("characters", "system"),
    [
        ("あんゞ", "hiragana"),
        ("アンーヽｱﾝㇰ", "katakana"),
        ("漢々〆〇𠮷", "kanji"),
        ("azAZéＡｚ", "latin"),
        ("1。、！Я한①", "other"),
    ],
)
def test_writing_systems(characters: str, system: str) -> None:
    assert {character: writing_system(character) for character in characters} == dict.fromkeys(characters, system)


def test_shares_are_of_what_is_no_whitespace() -> None:
    shares = writing_shares(Counter("ああア漢 a\n　1。。"))
    assert shares == {"hiragana": 0.25, "katakana": 0.125, "kanji": 0.125, "latin": 0.125, "other": 0.375}
    assert set(writing_shares(Counter(" ")).values()) == {0.0}


def test_bins_double() -> None:
    assert histogram([1, 2, 3, 4, 5, 33, 64]) == [(1, 2, 2), (3, 4, 2), (5, 8, 1), (9, 16, 0), (17, 32, 0), (33, 64, 2)]


def test_what_is_masked_is_shown_in_brackets() -> None:
    rows: list[Row] = [pair("一つ目は?", "青森県です。")]
    (example,) = build_examples(rows, tokenizer(), 1024)
    prompt = tokenizer().apply_chat_template(
        [{"role": "user", "content": "一つ目は?"}], tokenize=False, add_generation_prompt=True
    )
    assert render(example, tokenizer()) == f"[[{prompt}]]青森県です。<|im_end|>"
    (long,) = build_examples([pair("長い" * 500, "はい。")], tokenizer(), 4096)
    assert render(long, tokenizer()).endswith(f"]] … and {len(long.ids) - 400:,} more tokens")


def test_ten_rows_from_the_first_to_the_last_are_shown() -> None:
    rows: list[Row] = [pair(f"問{number}", "答") for number in range(91)]
    found = report(rows)
    assert [f"問{number}<" in text for number, text in zip(range(0, 91, 10), found.rendered)] == [True] * 10
    assert len(report(rows[:3]).rendered) == 3
    assert found == report(rows)


def test_overlap_that_is_allowed_is_reported() -> None:
    rows: list[Row] = [pair("a", "b")]
    kept = {"old": Overlap(7, 2, 0, (3, 0)), "chat": Overlap(4, 0, 0, None)}
    found = describe(rows, tokenizer(), layout(), Overlap(5, 1, 2, (0, 0)), kept)
    said = summary(found)[1][1]
    assert said.endswith(
        "3 of 5 validation rows are also in the training set; 2 of 7 rows of retention.eval_sets.old are trained on"
    )


def test_a_run_leaves_its_report_and_prints_three_lines(trained: Launched) -> None:
    rows = demo_rows("instructions")[:320]
    config = layout(micro_batch_size=2, seed=1234, sequence_length=512)
    found = describe(rows, tokenizer(), config, Overlap(40, 0, 0, None), {"english": Overlap(60, 0, 0, None)})
    record = json.loads(trained.folder.data_report_json.read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(asdict(found)))
    page = trained.folder.data_report.read_text(encoding="utf-8")
    assert page == report_page(found)
    for line in [text for _, text in summary(found)]:
        assert line in page
        assert line in trained.stdout
    assert page.count("\n--- ") == 10
    for text in found.rendered:
        assert text in page


def test_the_page_draws_the_histogram() -> None:
    rows: list[Row] = [*[Text("あ" * 3)] * 4, Text("か" * 300)]
    page = report_page(report(rows))
    bars = [line for line in page.splitlines() if line.endswith("#")]
    assert [line.count("#") for line in bars] == [40, 10]
    assert [line.split()[3] for line in bars] == ["4", "1"]
