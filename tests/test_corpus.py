"""Text becomes the same tokens whatever form it has, once; and sequences are cut from them."""

from __future__ import annotations

import functools
import itertools
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer, Qwen2Tokenizer

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.build import build
from qwen_cl.data.corpus.cache import Corpus, cache_directory, read_entry
from qwen_cl.data.corpus.examples import CorpusExamples
from qwen_cl.data.corpus.prepare import make_order, prepare_corpus
from qwen_cl.data.corpus.split import held_out
from qwen_cl.data.examples import Example
from tests.corpora import FORMS, TEXTS, json_lines, source, text_files

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "qwen_cl/demo/model"
VOCABULARY = 4096
WITH_BLANKS = [*TEXTS[:2], " \n", *TEXTS[2:], ""]


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(MODEL))


def expected_ids(text: str) -> list[int]:
    """As transformers tokenises it when asked to take no text for a special token."""
    ids = tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer().eos_token_id]


def built(path: Path | str, cache: Path) -> Corpus:
    order = make_order(source(path), tokenizer(), workers=2, cache=str(cache))
    build(order)
    corpus = read_entry(Path(order.entry), order.known.prefix)
    assert corpus is not None
    return corpus


def refusal(path: Path | str, cache: Path) -> str:
    with pytest.raises(UserError) as refused:
        built(path, cache)
    assert "\n" not in str(refused.value)
    assert leftovers(cache) == []
    return str(refused.value)


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"] if cache.exists() else []


def documents_of(prefix: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[number].tolist() for number in range(len(dataset))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "a.jsonl").write_bytes(json_lines(WITH_BLANKS))
    return built(directory / "a.jsonl", directory / "cache")


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


def test_the_entry_follows_content_field_and_tokenizer_and_not_the_name(tmp_path: Path) -> None:
    def entry(path: Path, eos: str = "<|endoftext|>", field: str = "text") -> str:
        other = AutoTokenizer.from_pretrained(str(MODEL), eos_token=eos)
        # What a caller did with it in passing is no part of it.
        other("a", truncation=True, max_length=3, padding="max_length")
        return make_order(source(path, text_field=field), other, workers=1, cache=str(tmp_path / "cache")).entry

    first, moved = tmp_path / "a.jsonl", tmp_path / "below" / "b.jsonl"
    moved.parent.mkdir()
    for path in (first, moved):
        path.write_bytes(json_lines(TEXTS))
    same = entry(first)
    assert entry(moved) == same
    assert entry(first, field="body") != same
    assert entry(first, eos="<|im_end|>") != same
    content = first.read_bytes()
    first.write_bytes(content[:-3] + b" " + content[-3:])
    assert entry(first) != same
    (tmp_path / "a.txt").write_bytes(content)
    assert entry(tmp_path / "a.txt") != same
    # The same bytes, parted elsewhere.
    for name, parts in (("x", (3, 10)), ("y", (4, 10))):
        (tmp_path / name).mkdir()
        bounds = [0, *parts, len(TEXTS)]
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            (tmp_path / name / f"{number}.txt").write_text("".join(TEXTS[start:stop]), encoding="utf-8")
    assert entry(tmp_path / "x") != entry(tmp_path / "y")


def test_the_cache_is_where_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QWEN_CL_CACHE", raising=False)
    assert cache_directory(None) == tmp_path / ".cache/qwen_cl/corpora"
    monkeypatch.setenv("QWEN_CL_CACHE", str(tmp_path / "other"))
    assert cache_directory(None) == tmp_path / "other/corpora"
    assert cache_directory("~/mine") == tmp_path / "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^data\.cache \(.*/file\) is not a directory$"):
        cache_directory(str(tmp_path / "file"))


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "short", "missing"])
def test_an_entry_that_is_not_whole_is_built_again(damage: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    order = make_order(source(tmp_path / "a.jsonl"), tokenizer(), workers=1, cache=str(tmp_path / "cache"))
    entry = Path(order.entry)
    build(order)
    whole = {path.name: path.read_bytes() for path in entry.iterdir()}
    if damage == "no manifest":
        (entry / "manifest.json").unlink()
    elif damage == "half a manifest":
        (entry / "manifest.json").write_bytes(whole["manifest.json"][:-40])
    elif damage == "short":
        (entry / "corpus.bin").write_bytes(whole["corpus.bin"][:-2])
    else:
        (entry / "text_bytes.npy").unlink()
    assert read_entry(entry, None) is None
    build(order)
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == whole


def test_a_tokenizer_without_its_rules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}', encoding="utf-8")
    (tmp_path / "merges.txt").touch()
    slow = Qwen2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    with pytest.raises(UserError, match=r"its tokenizer has no tokenizer\.json, which raw text is read with$"):
        make_order(source(tmp_path / "a.jsonl"), slow, workers=1, cache=str(tmp_path / "cache"))


def test_a_text_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([" ", ""]))
    message = f"data.path ({tmp_path}/a.jsonl) holds no text; nothing can be learnt from it"
    assert refusal(tmp_path / "a.jsonl", tmp_path / "cache") == message


def test_a_broken_line_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["text"] * 3000) + b"{")
    assert refusal(tmp_path / "a.jsonl", tmp_path / "cache").startswith(f"{tmp_path}/a.jsonl:3001: not JSON (")


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    directory = text_files(tmp_path / "texts", TEXTS)
    order = make_order(source(directory), tokenizer(), workers=1, cache=str(tmp_path / "cache"))
    (directory / "part" / "000a.txt").write_text("one more", encoding="utf-8")
    with pytest.raises(UserError, match=r"^data\.path \(.*/texts\) changed while it was read; run it again"):
        build(order)
    assert leftovers(tmp_path / "cache") == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["text " * 1000] * 50))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))  # the kernel refuses to write more to one file
    try:
        message = refusal(tmp_path / "a.jsonl", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"data.cache ({tmp_path}/cache) cannot be written to: File too large; free space there")
    assert built(tmp_path / "a.jsonl", tmp_path / "cache").counts.documents == 50


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "file").touch()
    order = make_order(source(tmp_path / "a.jsonl"), tokenizer(), workers=1, cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"^data\.cache \(.*/file/cache\) cannot be written to: Not a directory; "):
        build(order)


def write_indexed(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.int32) -> None:
    """Documents of several sequences each, as Megatron's preprocessing writes with --split-sentences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for sequences in documents:
        builder.add_document(np.array(list(itertools.chain(*sequences))), list(map(len, sequences)))
    builder.finalize(f"{prefix}.idx")


EOS = 4074
INDEXED = [[[5, 6, 7], [8, EOS]], [[9, EOS]], [[10], [11], [12, 13, EOS]]]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_an_indexed_dataset_is_taken_as_it_is(suffix: str, tmp_path: Path) -> None:
    write_indexed(tmp_path / "mine", INDEXED)
    before = (tmp_path / "mine.bin").read_bytes()
    corpus = built(f"{tmp_path}/mine{suffix}", tmp_path / "cache")
    assert corpus.prefix == f"{tmp_path}/mine"
    assert (corpus.counts.documents, corpus.counts.tokens, corpus.counts.largest_id) == (3, 12, EOS)
    assert corpus.text_bytes(np.array([0])) is None
    assert (tmp_path / "mine.bin").read_bytes() == before
    assert CorpusExamples(corpus.prefix, np.array([2, 0]), 6, EOS)[:] == [
        Example([EOS, 10, 11, 12, 13, EOS, 5], ((1, 7),)),
        Example([5, 6, 7, 8, EOS], ((1, 5),)),
    ]


@pytest.mark.parametrize(("vocabulary", "fits"), [(EOS + 1, True), (EOS, False)])
def test_ids_past_the_models_vocabulary_are_refused(vocabulary: int, fits: bool, tmp_path: Path) -> None:
    write_indexed(tmp_path / "mine", INDEXED, np.uint16)
    built(tmp_path / "mine", tmp_path / "cache")

    def prepare() -> Corpus:
        path = source(tmp_path / "mine")
        return prepare_corpus(path, tokenizer(), vocabulary, workers=1, cache=str(tmp_path / "cache"))

    if fits:
        assert prepare().counts.documents == 3
        return
    with pytest.raises(UserError) as refused:
        prepare()
    start = f"data.path ({tmp_path}/mine) has token id {EOS}, past the model's vocab_size ({EOS}); index it with"
    assert str(refused.value).startswith(start)


@pytest.mark.parametrize(
    ("documents", "damage", "message"),
    [
        (
            [[[5, EOS]], [[6, 7]]],
            None,
            "): document 2 ends with id 7, not with this tokenizer's end-of-text (4074); in",
        ),
        ([[[5, -2, EOS]]], None, ") has a negative token id (-2); index it again"),
        (INDEXED, ("bin", -4, None), "): .bin and .idx do not fit each other, or hold no document; write both again"),
        (INDEXED, ("bin", 0, None), "): .bin and .idx do not fit each other"),
        (INDEXED, ("idx", -8, None), "): .bin and .idx do not fit each other"),
        (INDEXED, ("idx", 20, None), "): the .idx is not an index of Megatron's; name the prefix of a pair that it"),
        (INDEXED, ("idx", 0, b"GGUF"), "): the .idx is not an index of Megatron's"),
        (INDEXED, ("idx", 17, b"\x07"), "): the .idx (version 1, type 7) is not one of token ids"),
        # The length of the first sequence, the place of the second, the end of the first document.
        (INDEXED, ("idx", 34, b"\x02"), "): .bin and .idx do not fit each other"),
        (INDEXED, ("idx", 34 + 6 * 4 + 8, b"\x08"), "): .bin and .idx do not fit each other"),
        (INDEXED, ("idx", 34 + 6 * 12 + 8, b"\x07"), "): .bin and .idx do not fit each other"),
        ([], None, "): .bin and .idx do not fit each other, or hold no document"),
    ],
)
def test_an_indexed_dataset_that_cannot_be_used(
    documents: list[list[list[int]]], damage: tuple[str, int, bytes | None] | None, message: str, tmp_path: Path
) -> None:
    write_indexed(tmp_path / "mine", documents)
    if damage is not None:
        suffix, place, replacement = damage
        content = bytearray((tmp_path / f"mine.{suffix}").read_bytes())
        if replacement is None:
            del content[place:]
        else:
            assert content[place : place + len(replacement)] != replacement
            content[place : place + len(replacement)] = replacement
        (tmp_path / f"mine.{suffix}").write_bytes(content)
    assert refusal(tmp_path / "mine", tmp_path / "cache").startswith(f"data.path ({tmp_path}/mine{message}")


def test_sequences_make_every_token_of_every_document_a_label_once(corpus: Corpus) -> None:
    eos = tokenizer().eos_token_id
    for selection in (np.arange(len(TEXTS)), np.array([3]), np.array([30, 2, 7, 8, 9, 1])):
        stream = [eos, *itertools.chain(*(expected_ids(TEXTS[number]) for number in selection))]
        # Also where the text ends with a sequence, one token before and one after.
        for length in (1, 2, 7, 64, len(stream) - 2, len(stream) - 1, len(stream), 10**6):
            expected = [stream[start : start + length + 1] for start in range(0, len(stream) - 1, length)]
            examples = CorpusExamples(corpus.prefix, selection, length, eos)
            assert [example.ids for example in examples] == expected
            assert [example.counted for example in examples] == [((1, len(ids)),) for ids in expected]
            assert sum(example.num_labels for example in examples) == examples.num_labels == len(stream) - 1


def test_sequences_are_a_sequence(corpus: Corpus) -> None:
    examples = CorpusExamples(corpus.prefix, np.arange(len(TEXTS)), 64, tokenizer().eos_token_id)
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
    train, validation = held_out(documents, share=share, seed=7)
    stream = np.random.PCG64(7)
    numbers = {number: int(stream.random_raw()) for number in range(documents)}
    expected = sorted(sorted(numbers, key=lambda number: numbers[number])[:count])
    assert validation.tolist() == expected
    assert train.tolist() == [number for number in range(documents) if number not in expected]


def test_the_split_follows_its_seed_alone() -> None:
    first = [part.tolist() for part in held_out(200, share=0.1, seed=1)]
    assert [part.tolist() for part in held_out(200, share=0.1, seed=2)] != first
    assert [part.tolist() for part in held_out(200, share=0.1, seed=1)] == first


@pytest.mark.parametrize(
    ("documents", "share", "message"),
    [
        (1, 0.02, "data.path has 1 document, and data.validation_share (0.02) leaves none to train on; lower it, or"),
        (2, 0.8, "data.path has 2 documents, and data.validation_share (0.8) leaves none to train on"),
    ],
)
def test_a_split_that_leaves_nothing_to_train_on_is_refused(documents: int, share: float, message: str) -> None:
    with pytest.raises(UserError) as refused:
        held_out(documents, share=share, seed=1)
    assert str(refused.value).startswith(message)
