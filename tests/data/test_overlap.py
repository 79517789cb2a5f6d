"""Validation rows that are in the training set: found, counted, refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_cl.config.data import FileDataConfig, NearDuplicates, TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.data.fingerprints import Encode, content_encoder, row_fingerprinter, row_fingerprints, token_fingerprints
from qwen_cl.data.leakage import check_leakage, training_rows, validation_rows
from qwen_cl.data.overlap import Overlap, find_overlap
from qwen_cl.data.rows import RowFiles, Text, read_rows, row_location
from qwen_cl.data.statistics_text import summary
from qwen_cl.planning.plan import Plan, make_plan, with_text
from tests.conftest import ROOT, launch
from tests.data.test_datamodule import files, tokenizer
from tests.support.composed_configs import compose_run

SENTENCE = "明治の初めに東京で生まれた祖父は、若いころ海を渡り、長いあいだ外国の港町で時計を直して暮らしたそうです。"


JSONL = FileDataConfig(
    path="",
    validation_path=None,
    validation_every=2,
    subset=None,
    fields={},
    prompt_field="prompt",
    completion_field="completion",
    text_field="text",
    near_duplicates=NearDuplicates.refuse,
    allow_overlap=False,
    system_prompt=None,
    chat_template=None,
    template_date=None,
    special_tokens_in_content=False,
)


def words(texts: list[str]) -> list[list[int]]:
    """A token a word."""
    return [[int(word) for word in text.split()] for text in texts]


def text(*numbers: int) -> str:
    return " ".join(map(str, numbers))


def find(train: list[str], validation: list[str], encode: Encode = words) -> Overlap:
    return find_overlap(row_fingerprints(train, encode), row_fingerprints(validation, encode))


def by_hand(train: list[str], validation: list[str]) -> tuple[int, int]:
    """Exact texts, and others by their 13-grams: the rule spelled out over sets of tuples."""

    def grams(line: str) -> set[tuple[str, ...]]:
        tokens = line.split()
        return {tuple(tokens[start : start + 13]) for start in range(len(tokens) - 12)}

    exact = by_grams = 0
    for line in validation:
        if line in train:
            exact += 1
            continue
        counts = [len({other for other in train if gram in grams(other)}) for gram in grams(line)]
        telling = [count for count in counts if count <= 10]
        by_grams += 2 * sum(count > 0 for count in telling) > len(telling)
    return exact, by_grams


def test_the_counts_are_those_of_the_rule_spelled_out() -> None:
    random = np.random.default_rng(0)
    template = list(range(500, 520))
    validation, train = [], []
    for number in range(60):
        line = random.integers(0, 400, size=int(random.integers(5, 60))).tolist()
        validation.append(text(*line))
        if number % 3 == 0:  # a part of it, in the middle of another
            part = line[: int(random.integers(1, len(line) + 1))]
            train.append(text(*random.integers(0, 400, size=9).tolist(), *part, 7, 7))
        if number % 10 == 1:
            train.append(validation[-1])
    validation += [text(*template, number) for number in range(1000, 1005)]
    train += [text(*template, number) for number in range(2000, 2020)]
    found = find(train, validation)
    assert (found.exact, found.by_grams) == by_hand(train, validation)
    assert found.exact == 6
    assert 3 <= found.by_grams <= 18
    assert found.texts == 65


@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [
        ([text(*range(30))], [text(*range(100, 130))], Overlap(1, 0, 0, None)),
        # Equal after NFKC and with any whitespace for a space; also where it is shorter than a gram.
        (["x", "１２  \n3"], ["9 9", "12 3"], Overlap(2, 1, 0, (1, 1))),
        # Twelve tokens of thirteen are no gram.
        ([text(*range(12), 99)], [text(*range(12))], Overlap(1, 0, 0, None)),
        # 18 grams: half of them is not more than half.
        ([text(*range(21))], [text(*range(30))], Overlap(1, 0, 0, None)),
        ([text(*range(22))], [text(*range(30))], Overlap(1, 0, 1, (0, 0))),
        # The pair that is named shares most.
        ([text(*range(20)), text(*range(28)), text(*range(14))], [text(*range(30))], Overlap(1, 0, 1, (0, 1))),
        # In more than ten training texts: a template. Copies of one text are one.
        ([text(*range(29), 50 + copy) for copy in range(10)], [text(*range(30))], Overlap(1, 0, 1, (0, 0))),
        ([text(*range(29), 50 + copy) for copy in range(11)], [text(*range(30))], Overlap(1, 0, 0, None)),
        ([text(*range(29))] * 20, [text(*range(30))], Overlap(1, 0, 1, (0, 0))),
    ],
)
def test_what_counts_as_overlap(train: list[str], validation: list[str], expected: Overlap) -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return words([line.replace("x", "0") for line in texts])

    assert find(train, validation, encode) == expected


def test_grams_are_of_the_tokenizers_ids_without_whitespace() -> None:
    encode = content_encoder(tokenizer())
    (ids,) = encode(["時計 \n\n 時計"])
    pieces = [tokenizer().decode([token]) for token in ids]
    assert all(piece.strip() for piece in pieces)
    assert "".join(pieces).replace(" ", "") == "時計時計"
    edited = SENTENCE.replace("です", "だ")
    found = find(["別の話。" + edited, "関係のない話です。"], [SENTENCE], encode)
    assert found == Overlap(1, 0, 1, (0, 0))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("every", [2, 3, 5])
@pytest.mark.parametrize("held_out", [True, False])
def test_a_row_is_found_again_by_its_line(every: int, held_out: bool, tmp_path: Path) -> None:
    path, other = tmp_path / "rows.jsonl", tmp_path / "validation.jsonl"
    for name in (path, other):
        lines = [f'{{"text": "{number}"}}' for number in range(1, 21)]
        lines[6] = lines[13] = " "  # blank lines are no rows
        name.write_text("\n".join(lines), encoding="utf-8")
    source = files(path, None if held_out else other, every, text=True)
    for validation, rows in zip((False, True), read_rows(source)):
        for index, row in enumerate(rows):
            assert isinstance(row, Text)
            name = other if validation and not held_out else path
            assert row_location(source, index, validation=validation) == f"{name}:{row.text}"


def refusal(source: RowFiles) -> str:
    train, validation = read_rows(source)
    prints = row_fingerprinter(tokenizer())
    sides = [training_rows(train, source, prints)], [validation_rows(validation, source, prints)]
    with pytest.raises(UserError) as refused:
        check_leakage(JSONL, *sides)
    return str(refused.value)


def test_the_message_names_both_lines_the_counts_and_the_fix(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"text": "一"}, {"text": "二"}, {"text": "x" + SENTENCE}])
    validation = jsonl(tmp_path / "validation.jsonl", [{"text": "三"}, {"text": SENTENCE}, {"text": " 二"}])
    assert refusal(files(train, validation, text=True)) == (
        f"{validation}:3: this row, which validates, is in the training set too ({train}:2), as are 2 of 3 "
        "(1 identical, 1 with more than half of their 13-grams); their loss would measure what is memorized: "
        "remove them from one side, or write data.allow_overlap=true"
    )
    assert refusal(files(jsonl(tmp_path / "rows.jsonl", [{"text": "a"}] * 2), every=2, text=True)).startswith(
        f"{tmp_path}/rows.jsonl:1: this row, held out by data.validation_every (2), is in the training set too "
        f"({tmp_path}/rows.jsonl:2), as are 1 of 1 (1 identical"
    )


@pytest.mark.slow
def test_a_run_is_refused_unless_overlap_is_allowed(tmp_path: Path) -> None:
    lines = (ROOT / "qwen_cl/demo/data/instructions.train.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines[:4], lines[0]]) + "\n", encoding="utf-8")
    arguments = ["data=jsonl", f"data.path={path}", "data.validation_every=3"]
    refused = launch(*arguments, directory=tmp_path / "outputs/run")
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"{path}:1: this row, held out by data.validation_every (3), is in the training set too ({path}:5), as are 1 "
        "of 2 (1 identical, 0 with more than half of their 13-grams)"
    )
    assert not (tmp_path / "outputs/run").exists()
    plan = make_plan(compose_run("cluster.accelerator=cpu", *arguments, "data.allow_overlap=true"))
    assert plan.data_report is not None
    assert plan.data_report.overlap == Overlap(2, 1, 0, (0, 2))
    assert "1 of 2 validation rows are also in the training set" in summary(plan.data_report)[1][1]


OLD = ["An old story of a baker who rose at three to light the oven and sold his bread before the bells.", "Another."]
EDITED = OLD[0].replace("before the bells", "by noon")


def set_of(path: Path, *texts: str) -> str:
    return str(jsonl(path, [{"text": text} for text in texts]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_what_measures_forgetting_is_not_trained_on(kind: str, tmp_path: Path) -> None:
    """Neither as the run's own data nor replayed; the run that is refused says where both are."""
    kept = set_of(tmp_path / "kept.jsonl", "Something new.", EDITED)
    train = set_of(tmp_path / "train.jsonl", "一", "二", "三", *OLD, "四")
    fresh = set_of(tmp_path / "fresh.jsonl", "一", "二", "三", "四")
    replay = set_of(tmp_path / "replay.jsonl", *OLD)
    validation = set_of(tmp_path / "validation.jsonl", "五")
    common = ["task=pretrain", "cluster.accelerator=cpu", f"data={kind}", f"data.validation_path={validation}"]
    common += ["retention=files", f"retention.eval_sets={{old: '{kept}'}}"]

    def planned(path: str, *said: str) -> Plan:
        config = compose_run(*common, f"data.path={path}", *said)
        plan = make_plan(config)
        return with_text(plan, config.data) if isinstance(config.data, TextDataConfig) else plan

    message = (
        f"{kept}:2: this row of retention.eval_sets.old, which measures forgetting, is in {{}} too ({{}}), as "
        "are 1 of 2 (0 identical, 1 with more than half of their 13-grams); their loss would measure what is "
        "memorized: remove them from one side, or write data.near_duplicates=report"
    )
    replayed = ["replay=files", f"replay.datasets={{tales: '{replay}'}}"]
    own = "the training set" if kind == "jsonl" else "the training text"
    for said, where in (
        ((train,), (own, f"{train}:4")),
        ((fresh, *replayed), ("replay.datasets.tales", f"{replay}:1")),
    ):
        with pytest.raises(UserError) as refused:
            planned(*said, "data.near_duplicates=refuse")
        assert str(refused.value) == message.format(*where)
        for reported in ([], ["data.near_duplicates=report"], ["data.allow_overlap=true"]):
            report = planned(*said, *reported).data_report
            assert report is not None
            assert report.retention_overlap["old"].found == 1
            (near,) = [pairs for pairs in report.near_duplicates if pairs.count]
            assert (near.what, near.count, near.of, near.moved) == ("rows of retention.eval_sets.old", 1, 2, False)
            assert near.examples == [(f"{kept}:2", where[1])]
    planned(fresh)


def test_replayed_rows_do_not_validate_either(tmp_path: Path) -> None:
    train = set_of(tmp_path / "train.jsonl", "一", "二")
    validation, replay = (set_of(tmp_path / f"{name}.jsonl", *OLD) for name in ("validation", "replay"))
    said = ["task=pretrain", "data=jsonl", f"data.path={train}", f"data.validation_path={validation}"]
    with pytest.raises(UserError) as refused:
        make_plan(compose_run(*said, "replay=files", f"replay.datasets={{tales: '{replay}'}}"))
    start = (
        f"{validation}:1: this row, which validates, is in replay.datasets.tales too ({replay}:1), as are 2 of 2 (2 "
    )
    assert str(refused.value).startswith(start)


def test_embedded_data_cannot_allow_an_overlap(tmp_path: Path) -> None:
    first = (ROOT / "qwen_cl/demo/data/text.train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "kept.jsonl").write_text(first + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"remove them from one side$"):
        make_plan(
            compose_run("task=pretrain", "retention=files", f"retention.eval_sets={{a: '{tmp_path / 'kept.jsonl'}'}}")
        )


@pytest.mark.parametrize("vocabulary", [2, 90])
def test_documents_of_a_corpus_are_compared_as_rows_are(vocabulary: int, tmp_path: Path) -> None:
    """Apply the same rule, written out, to the same tokens without whitespace."""
    random = np.random.default_rng(vocabulary)
    words = [token for token in range(300, 600) if tokenizer().decode([token]).strip()][:vocabulary]
    blank = next(token for token in range(600) if tokenizer().decode([token]).isspace())
    lines = [random.choice(words, int(random.integers(1, 60))).tolist() for _ in range(40)]
    for number in range(0, 36, 3):  # a part of it within one that is trained on
        lines[number + 1][3:3] = lines[number][: int(random.integers(1, 60))]
    lines[10] = lines[9]
    measured = np.arange(0, 40, 3)
    trained = np.setdiff1d(np.arange(40), measured)
    with_blanks = [[token for word in line for token in (word, *[blank] * int(random.integers(2)))] for line in lines]
    documents = [np.array(line) for line in with_blanks]
    found = find_overlap(
        token_fingerprints([documents[number] for number in trained], tokenizer()),
        token_fingerprints([documents[number] for number in measured], tokenizer()),
    )
    texts = [text(*line) for line in lines]
    assert (found.exact, found.by_grams) == by_hand(
        [texts[number] for number in trained], [texts[number] for number in measured]
    )
    assert found.exact >= 1
    assert found.texts == len(measured)
