"""Text becomes the same tokens whatever form it has."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.cache import Corpus
from qwen_cl.planning.plan import make_plan
from tests.support.building import built, corpus_with_blanks, documents_of, expected_ids, tokenizer
from tests.support.composed_configs import compose_run
from tests.support.corpora import FORMS, TEXTS, json_lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_with_blanks(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_tokens_that_transformers_gives(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path, TEXTS)
    corpus = built(path, tmp_path / "cache")
    expected = [expected_ids(text) for text in TEXTS]
    assert documents_of(corpus.prefix) == expected
    assert corpus.counts.documents == len(TEXTS)
    assert corpus.counts.tokens == sum(map(len, expected))
    assert corpus.counts.blank == 0
    assert corpus.counts.largest_id == max(max(ids) for ids in expected)


def test_no_text_is_taken_for_a_special_token(corpus: Corpus) -> None:
    eos = tokenizer().eos_token_id
    documents = documents_of(corpus.prefix)
    assert sum("<|endoftext|>" in text for text in TEXTS) == 1
    assert [ids.count(eos) for ids in documents] == [1] * len(TEXTS)
    special = set(tokenizer().all_special_ids) - {eos}
    assert not special & set(itertools.chain(*documents))
    assert tokenizer().decode(documents[2][:-1]) == TEXTS[2]


def test_blank_documents_are_left_out_and_counted(corpus: Corpus) -> None:
    assert corpus.counts.blank == 2
    assert documents_of(corpus.prefix) == [expected_ids(text) for text in TEXTS]


def test_text_bytes_are_those_of_the_selected_documents(corpus: Corpus) -> None:
    for selection in ([0], [1, 4, 20], list(range(len(TEXTS)))):
        expected = sum(len(TEXTS[number].encode()) for number in selection)
        assert corpus.text_bytes(np.array(selection)) == expected
    assert len(TEXTS[1].encode()) > len(TEXTS[1])


def test_order_and_whole_are_kept_over_many_batches(tmp_path: Path) -> None:
    texts = [f"{number} " + "あ" * (number % 50) for number in range(2500)]
    texts[1700] = "long " * 120_000  # a batch of its own
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    documents = documents_of(built(tmp_path / "a.jsonl", tmp_path / "cache").prefix)
    chosen = [*range(0, 2500, 97), 1023, 1024, 1025, 1699, 1700, 1701, 2499]
    assert len(documents) == 2500
    assert [documents[number] for number in chosen] == [expected_ids(texts[number]) for number in chosen]


def test_raw_text_is_for_pretraining(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    message = r"^data=text is raw text, for task=pretrain; task=finetune takes data=jsonl$"
    with pytest.raises(UserError, match=message):
        make_plan(compose_run("task=finetune", "data=text", f"data.path='{tmp_path / 'a.txt'}'"))
