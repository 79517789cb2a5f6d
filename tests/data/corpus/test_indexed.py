"""An indexed dataset of the user's own is taken as it is, if it is whole and fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.cache import Corpus
from qwen_cl.data.corpus.examples import CorpusExamples
from qwen_cl.data.corpus.indexed_reader import read_bounds, read_ids
from qwen_cl.data.corpus.prepare import prepare_corpus
from qwen_cl.data.corpus.selection import Selection
from qwen_cl.data.examples import Example
from qwen_cl.data.raw_text import Delimiters
from tests.support.building import EOS, INDEXED, built, refusal, tokenizer, write_indexed
from tests.support.corpora import source


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_an_indexed_dataset_is_taken_as_it_is(suffix: str, tmp_path: Path) -> None:
    write_indexed(tmp_path / "mine", INDEXED)
    before = (tmp_path / "mine.bin").read_bytes()
    corpus = built(f"{tmp_path}/mine{suffix}", tmp_path / "cache")
    assert corpus.prefix == f"{tmp_path}/mine"
    assert (corpus.counts.documents, corpus.counts.tokens, corpus.counts.largest_id) == (3, 12, EOS)
    assert corpus.text_bytes(np.array([0])) is None
    assert (tmp_path / "mine.bin").read_bytes() == before
    assert CorpusExamples(Selection(corpus, np.array([2, 0])), 6, Delimiters(None, EOS))[:] == [
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
        (INDEXED, ("bin", -4, None), "): .bin and .idx do not match, or have no document; write both again"),
        (INDEXED, ("bin", 0, None), "): .bin and .idx do not match"),
        (INDEXED, ("idx", -8, None), "): .bin and .idx do not match"),
        (INDEXED, ("idx", 20, None), "): the .idx is not an index in Megatron's format; name the prefix of a pair"),
        (INDEXED, ("idx", 0, b"GGUF"), "): the .idx is not an index in Megatron's format"),
        (INDEXED, ("idx", 17, b"\x07"), "): the .idx (version 1, type 7) is not one of token ids"),
        # The length of the first sequence, the place of the second, the end of the first document.
        (INDEXED, ("idx", 34, b"\x02"), "): .bin and .idx do not match"),
        (INDEXED, ("idx", 34 + 6 * 4 + 8, b"\x08"), "): .bin and .idx do not match"),
        (INDEXED, ("idx", 34 + 6 * 12 + 8, b"\x07"), "): .bin and .idx do not match"),
        ([], None, "): .bin and .idx do not match, or have no document"),
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


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_the_launcher_reads_an_indexed_dataset_as_megatron_does(dtype: str, tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[[1, 2, 3], [4]], [[5, 6]], [[7], [8], [9, 10]]]  # of several sequences too
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.dtype(dtype).type)
    for document in documents:
        builder.add_document(torch.tensor([token for ids in document for token in ids]), [len(ids) for ids in document])
    builder.finalize(str(tmp_path / "a.idx"))
    prefix = str(tmp_path / "a")
    assert read_ids(prefix).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert read_bounds(prefix).tolist() == [0, 4, 6, 10]
