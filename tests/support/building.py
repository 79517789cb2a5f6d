"""Corpora built in this process, and their content."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.build import build
from qwen_cl.data.corpus.cache import Corpus, read_entry
from qwen_cl.data.corpus.prepare import make_build_request
from tests.support.corpora import TEXTS, json_lines, source

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "qwen_cl/demo/model"
VOCABULARY = 4096
WITH_BLANKS = [*TEXTS[:2], " \n", *TEXTS[2:], ""]


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(MODEL))


def expected_ids(text: str) -> list[int]:
    """Return the ids of transformers when text is never read as a special token."""
    ids = tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer().eos_token_id]


def built(path: Path | str, cache: Path) -> Corpus:
    request = make_build_request(source(path), tokenizer(), workers=1, cache=str(cache))
    build(request)
    corpus = read_entry(Path(request.entry), request.known.prefix)
    assert corpus is not None
    return corpus


def corpus_with_blanks(directory: Path) -> Corpus:
    """Build the corpus of ``WITH_BLANKS``, given as JSON lines."""
    (directory / "a.jsonl").write_bytes(json_lines(WITH_BLANKS))
    return built(directory / "a.jsonl", directory / "cache")


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


def write_indexed(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.int32) -> None:
    """Write documents of several sequences each, as Megatron's preprocessing does with --split-sentences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for sequences in documents:
        builder.add_document(np.array(list(itertools.chain(*sequences))), list(map(len, sequences)))
    builder.finalize(f"{prefix}.idx")


EOS = 4074
INDEXED = [[[5, 6, 7], [8, EOS]], [[9, EOS]], [[10], [11], [12, 13, EOS]]]
