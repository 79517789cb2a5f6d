"""Documents of raw text begin with the BOS that the tokenizer adds, and text is text, as transformers has it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import LossOn
from qwen_cl.data.corpus.build import build
from qwen_cl.data.corpus.cache import Corpus, read_entry
from qwen_cl.data.corpus.examples import CorpusExamples
from qwen_cl.data.corpus.prepare import make_build_request
from qwen_cl.data.corpus.selection import Selection
from qwen_cl.data.eval_sets import NamedSet, score_set
from qwen_cl.data.examples import Example, build_examples
from qwen_cl.data.fingerprints import corpus_fingerprinter, token_fingerprints
from qwen_cl.data.raw_text import Delimiters, document_delimiters, encode_start, encode_text
from qwen_cl.data.rows import Text
from qwen_cl.data.statistics import SequenceLayout, describe
from qwen_cl.inference.loss import set_loss
from qwen_cl.inference.prompts import one_prompt, render
from qwen_cl.training.callbacks.samples import question_of
from tests.support.bos_tokenizers import BOS_ID, EOS_ID, KINDS, save_tokenizer
from tests.support.building import write_indexed
from tests.support.corpora import json_lines, source
from tests.training.test_forgetting import demo_rows

TEXTS = [
    *(row["text"] for row in demo_rows("text.validation.jsonl", 6)),
    "<s>It begins with BOS</s>, spelt out. <|user|>",
    "x",
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="module", params=KINDS)
def without_bos(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param, adds_bos=False)


def by_transformers(tokenizer: Any, text: str) -> list[int]:
    """A document as transformers tokenizes it by itself, and its end."""
    return [*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]


def expected_examples(tokenizer: Any, texts: list[str], length: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels, -100 where there is none: of the stream cut with one id shared."""
    stream = list(itertools.chain(*(by_transformers(tokenizer, text) for text in texts)))
    starts = np.cumsum([0, *(len(by_transformers(tokenizer, text)) for text in texts[:-1])]).tolist()
    labels = [-100 if place in starts else token for place, token in enumerate(stream)]
    cuts = range(0, len(stream) - 1, length)
    return [(stream[cut : cut + length + 1], [-100, *labels[cut + 1 : cut + length + 1]]) for cut in cuts]


def labels_of(example: Example) -> list[int]:
    counted = set(itertools.chain(*(range(start, stop) for start, stop in example.loss_spans)))
    return [token if place in counted else -100 for place, token in enumerate(example.ids)]


def test_the_tokenizer_is_asked(tokenizer: Any, without_bos: Any, tmp_path: Path) -> None:
    assert tokenizer.bos_token_id == without_bos.bos_token_id == BOS_ID
    assert document_delimiters(tokenizer) == Delimiters(BOS_ID, EOS_ID)
    assert document_delimiters(without_bos) == Delimiters(None, EOS_ID)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("<s> $A </s>", Delimiters(BOS_ID, EOS_ID)),
        ("$A </s>", Delimiters(None, EOS_ID)),
        ("</s> $A", Delimiters(None, EOS_ID)),  # as OPT's: one stands between two documents already
        ("<|user|> $A", Delimiters(3, EOS_ID)),
    ],
)
def test_whatever_else_it_adds(template: str, expected: Delimiters, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, "byte level")
    names = [piece for piece in template.split() if piece != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    assert document_delimiters(tokenizer) == expected
    start = [] if template.startswith("$A") else [tokenizer.convert_tokens_to_ids(names[0])]
    plain = tokenizer("Once", add_special_tokens=False)["input_ids"]
    assert encode_start(tokenizer, "Once") == [*start, *plain]


def test_two_tokens_before_a_text_are_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, "byte level")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <|user|> $A", special_tokens=[("<s>", BOS_ID), ("<|user|>", 3)]
    )
    with pytest.raises(UserError, match=r"puts 2 tokens before a text \(<s> <\|user\|>\), and raw text can begin with"):
        document_delimiters(tokenizer)


def built(tokenizer: Any, path: Path, cache: Path) -> Corpus:
    request = make_build_request(source(path), tokenizer, workers=1, cache=str(cache))
    build(request)
    corpus = read_entry(Path(request.entry), request.known.prefix)
    assert corpus is not None
    return corpus


def test_every_document_begins_with_bos_and_every_other_token_is_a_label_once(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    corpus = built(tokenizer, tmp_path / "a.jsonl", tmp_path / "cache")
    rows = [Text(text) for text in TEXTS]
    lengths = [len(by_transformers(tokenizer, text)) for text in TEXTS]
    total = sum(lengths)
    for length in (2, 3, 7, 64, lengths[0] - 1, lengths[0], lengths[0] + 1, total - 2, total - 1, total, 10**6):
        expected = expected_examples(tokenizer, TEXTS, length)
        examples = list(build_examples(rows, tokenizer, length))
        assert [(example.ids, labels_of(example)) for example in examples] == expected
        selection = Selection(corpus, np.arange(len(TEXTS)))
        from_corpus = CorpusExamples(selection, length, document_delimiters(tokenizer))
        assert list(from_corpus) == examples
        assert from_corpus.num_labels == sum(example.num_labels for example in examples) == total - len(TEXTS)
        assert max(example.num_positions for example in examples) <= length


def test_the_data_report_counts_bos_and_no_label_of_it(tokenizer: Any) -> None:
    layout = SequenceLayout(sequence_length=16, micro_batch_size=2, seed=1, loss_on=LossOn.all, packing=False)
    found = describe([Text(text) for text in TEXTS], tokenizer, layout)
    lengths = [len(by_transformers(tokenizer, text)) for text in TEXTS]
    assert (found.tokens, found.labels) == (sum(lengths), sum(lengths) - len(TEXTS))
    assert found.sequences == {"packed": len(expected_examples(tokenizer, TEXTS, 16))}
    assert found.rendered[-1] == "[[<s>]]x</s>"


def test_nothing_changes_where_the_tokenizer_adds_no_bos(without_bos: Any, tmp_path: Path) -> None:
    stream = [EOS_ID, *itertools.chain(*(by_transformers(without_bos, text) for text in TEXTS))]
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    corpus = built(without_bos, tmp_path / "a.jsonl", tmp_path / "cache")
    examples = list(build_examples([Text(text) for text in TEXTS], without_bos, 16))
    selection = Selection(corpus, np.arange(len(TEXTS)))
    assert list(CorpusExamples(selection, 16, document_delimiters(without_bos))) == examples
    assert [example.ids for example in examples] == [stream[cut : cut + 17] for cut in range(0, len(stream) - 1, 16)]
    assert all(example.loss_spans == ((1, len(example.ids)),) for example in examples)


def test_what_reads_like_a_special_token_is_text(tokenizer: Any) -> None:
    text = "<s>a</s> b <|user|>"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert encode_text(tokenizer, text) == ids
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text
    assert render(one_prompt(text), tokenizer, raw=True) == [BOS_ID, *ids]
    (example,) = build_examples([Text(text)], tokenizer, 512)
    assert example.ids == [BOS_ID, *ids, EOS_ID]
    (as_corpus,), (stored,) = corpus_fingerprinter(tokenizer)([text]), token_fingerprints([np.array(ids)], tokenizer)
    assert as_corpus.key == stored.key


def test_samples_are_asked_as_texts_begin(tokenizer: Any) -> None:
    examples = list(build_examples([Text("a b c d e"), Text("f g h i j k")], tokenizer, 4))
    for example in examples:
        assert question_of(example, EOS_ID, 2, BOS_ID).prompt[0] == BOS_ID
    between = Example([EOS_ID, BOS_ID, 7, 8, 9, 10], ((2, 6),))
    assert question_of(between, EOS_ID, 2, BOS_ID).prompt == [BOS_ID, 7]
    assert question_of(between, EOS_ID, 2, BOS_ID).expected == [8, 9]


DOCUMENTS = [[[5, 6, 7], [8, EOS_ID]], [[9, EOS_ID]], [[10], [11], [12, 13, EOS_ID]]]
WITH_BOS = [[[BOS_ID, *document[0]], *document[1:]] for document in DOCUMENTS]


def test_an_indexed_dataset_with_bos_and_one_without_are_the_same(tokenizer: Any, tmp_path: Path) -> None:
    found = []
    for name, documents in (("without", DOCUMENTS), ("with", WITH_BOS)):
        write_indexed(tmp_path / name, documents)
        corpus = built(tokenizer, tmp_path / name, tmp_path / "cache")
        assert corpus.counts.has_bos is (name == "with")
        selection = Selection(corpus, np.array([0, 2]))
        found.append(list(CorpusExamples(selection, 6, document_delimiters(tokenizer))))
        assert [ids.tolist() for ids in selection.texts()] == [[5, 6, 7, 8], [10, 11, 12, 13]]
        assert selection.lengths().tolist() == [5, 5]
    assert found[0] == found[1]
    assert found[0] == [
        Example([BOS_ID, 5, 6, 7, 8, EOS_ID, BOS_ID], ((1, 6),)),
        Example([BOS_ID, 10, 11, 12, 13, EOS_ID], ((1, 6),)),
    ]


def test_an_indexed_dataset_is_looked_at_again_where_bos_counts(tokenizer: Any, tmp_path: Path) -> None:
    """Check that counts for a tokenizer that adds no BOS are not reused."""
    write_indexed(tmp_path / "mine", WITH_BOS)
    plain = save_tokenizer(tmp_path / "plain", "byte level", adds_bos=False)
    assert not built(plain, tmp_path / "mine", tmp_path / "cache").counts.has_bos
    assert built(tokenizer, tmp_path / "mine", tmp_path / "cache").counts.has_bos


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (
            [*WITH_BOS[:2], DOCUMENTS[2]],
            "document 1 begins with this tokenizer's BOS (1) and document 3 does",
        ),
        (
            [DOCUMENTS[0], *WITH_BOS[1:]],
            "document 2 begins with this tokenizer's BOS (1) and document 1 does",
        ),
        (
            [*WITH_BOS[:2], [[BOS_ID, BOS_ID, 5, EOS_ID]]],
            "document 3 has this tokenizer's BOS (1) at its token 2",
        ),
        (
            [*WITH_BOS[:1], [[BOS_ID, 5, EOS_ID, BOS_ID, EOS_ID]]],
            "document 2 has this tokenizer's BOS (1) at its token",
        ),
        ([[[5, BOS_ID, EOS_ID]]], "document 1 has this tokenizer's BOS (1) at its token 2, where no document begins"),
    ],
    ids=["not the last", "not the first", "twice", "in the middle", "in the middle alone"],
)
def test_bos_that_stands_elsewhere_is_refused(
    documents: list[list[list[int]]], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    write_indexed(tmp_path / "mine", documents)
    with pytest.raises(UserError) as refused:
        built(tokenizer, tmp_path / "mine", tmp_path / "cache")
    assert str(refused.value).startswith(f"data.path ({tmp_path}/mine): {message}")


def test_a_llama_trained_on_texts_after_bos_is_evaluated_after_bos(tokenizer: Any, tmp_path: Path) -> None:
    """Against transformers' own loss of what its tokenizer makes of each text, whole."""
    texts = TEXTS[:4]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    batches = [torch.tensor([by_transformers(tokenizer, text)[:96]]) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        for ids in batches:
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for text in texts:
        ids = torch.tensor([by_transformers(tokenizer, text)])
        with torch.no_grad():
            right = float(model(ids, labels=ids).loss)
            after_eos = torch.cat([torch.tensor([[EOS_ID]]), ids[:, 1:]], dim=1)
            wrong = float(model(after_eos, labels=after_eos).loss)
        named = NamedSet("a", "a.jsonl", [Text(text)], ["a.jsonl:1"])
        found = set_loss(model, score_set(named, tokenizer, 1024, LossOn.all), 2)
        assert found.tokens == ids.shape[1] - 1
        assert found.num_bytes == len(text.encode())
        assert found.loss == pytest.approx(right, abs=1e-5)
        assert abs(right - wrong) > 1e-3
