"""Sequences are cut from a corpus, and documents of it held out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.cache import Corpus
from qwen_cl.data.corpus.examples import CorpusExamples
from qwen_cl.data.corpus.selection import Selection
from qwen_cl.data.corpus.split import split_documents
from qwen_cl.data.raw_text import Delimiters
from tests.support.building import corpus_with_blanks, expected_ids, tokenizer
from tests.support.corpora import TEXTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_with_blanks(tmp_path_factory.mktemp("corpus"))


def test_sequences_make_every_token_of_every_document_a_label_once(corpus: Corpus) -> None:
    eos = tokenizer().eos_token_id
    for selection in (np.arange(len(TEXTS)), np.array([3]), np.array([30, 2, 7, 8, 9, 1])):
        stream = [eos, *itertools.chain(*(expected_ids(TEXTS[number]) for number in selection))]
        # Also where the text ends with a sequence, one token before and one after.
        for length in (1, 2, 7, 64, len(stream) - 2, len(stream) - 1, len(stream), 10**6):
            expected = [stream[start : start + length + 1] for start in range(0, len(stream) - 1, length)]
            examples = CorpusExamples(Selection(corpus, selection), length, Delimiters(None, eos))
            assert [example.ids for example in examples] == expected
            assert [example.loss_spans for example in examples] == [((1, len(ids)),) for ids in expected]
            assert sum(example.num_labels for example in examples) == examples.num_labels == len(stream) - 1


def test_sequences_are_a_sequence(corpus: Corpus) -> None:
    examples = CorpusExamples(Selection(corpus, np.arange(len(TEXTS))), 64, Delimiters(None, tokenizer().eos_token_id))
    everything = list(examples)
    assert len(examples) == len(everything) > 5
    assert examples[-1] == everything[-1]
    assert examples[1:4] == everything[1:4]
    assert examples[::-2] == everything[::-2]
    for beyond in (len(everything), -len(everything) - 1):
        with pytest.raises(IndexError):
            examples[beyond]


@pytest.mark.parametrize(
    ("documents", "share", "count"), [(2, 0.02, 1), (10, 0.02, 1), (100, 0.02, 2), (1000, 0.1234, 123), (10, 0.85, 8)]
)
def test_held_out_documents_are_those_with_the_smallest_numbers(documents: int, share: float, count: int) -> None:
    train, validation = split_documents(documents, share=share, seed=7)
    stream = np.random.PCG64(7)
    numbers = {number: int(stream.random_raw()) for number in range(documents)}
    expected = sorted(sorted(numbers, key=lambda number: numbers[number])[:count])
    assert validation.tolist() == expected
    assert train.tolist() == [number for number in range(documents) if number not in expected]


def test_the_split_follows_its_seed_alone() -> None:
    first = [part.tolist() for part in split_documents(200, share=0.1, seed=1)]
    assert [part.tolist() for part in split_documents(200, share=0.1, seed=2)] != first
    assert [part.tolist() for part in split_documents(200, share=0.1, seed=1)] == first


@pytest.mark.parametrize(
    ("documents", "share", "message"),
    [
        (
            1,
            0.02,
            "data.path has 1 document, and data.validation_fraction (0.02) leaves none to train on; lower it, or",
        ),
        (2, 0.8, "data.path has 2 documents, and data.validation_fraction (0.8) leaves none to train on"),
    ],
)
def test_a_split_that_leaves_nothing_to_train_on_is_refused(documents: int, share: float, message: str) -> None:
    with pytest.raises(UserError) as refused:
        split_documents(documents, share=share, seed=1)
    assert str(refused.value).startswith(message)
