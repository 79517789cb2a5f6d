"""The raw text of a run: what of which corpus trains and validates, and how much of one is in the other. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_cl.config.data import TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.cache import Corpus, Counts
from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.data.corpus.prepare import prepare_corpus, source_content
from qwen_cl.data.corpus.reader import read_bounds, read_ids
from qwen_cl.data.corpus.split import held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GRAM = 13
"""Tokens, as in overlap.py."""
CHUNK = 2**22
MOST_FOUND = 0.5
"""Part of a document's grams, above which it counts as one that is trained on."""
Selection = tuple[Corpus, npt.NDArray[np.int64]]
"""A corpus, and the indices of some of its documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTarget:
    train: Corpus
    validation: Corpus | None
    """None where it is held out of ``train``."""
    validation_share: float
    seed: int

    def split(self) -> tuple[Selection, Selection]:
        """What trains, and what validates."""
        if self.validation is not None:
            both = (self.train, self.validation)
            first, second = ((corpus, np.arange(corpus.counts.documents)) for corpus in both)
            return first, second
        trained, measured = held_out(self.train.counts.documents, share=self.validation_share, seed=self.seed)
        return (self.train, trained), (self.train, measured)

    @property
    def content(self) -> str:
        return self.train.content + (self.validation.content if self.validation else "")

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> TextTarget:
        corpora = {name: _corpus(plain[name]) if plain[name] else None for name in ("train", "validation")}
        return cls(**{**plain, **corpora})


def prepare_target(data: TextDataConfig, seed: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TextTarget:
    """Tokenises what is not in the cache yet.

    Raises:
        UserError: a text is not as it must be, or what validates is trained on.
        RunFailed: the process that tokenises died.
    """

    corpora = [
        prepare_corpus(source, tokenizer, vocab_size, workers=data.workers, cache=data.cache)
        for source in _sources(data)
    ]
    train, validation = corpora if len(corpora) == 2 else (corpora[0], None)
    target = TextTarget(train=train, validation=validation, validation_share=data.validation_share, seed=seed)
    if not data.allow_overlap:
        _refuse_overlap(target)
    return target


def text_content(data: TextDataConfig) -> str:
    """``TextTarget.content`` of what is there now, without tokenising it."""
    return "".join(source_content(source, cache=data.cache) for source in _sources(data))


def save_target(target: TextTarget, path: Path) -> None:
    path.write_text(json.dumps(target.plain(), indent=2) + "\n", encoding="utf-8")


def summarise(target: TextTarget) -> list[tuple[str, str]]:
    """Lines for the terminal."""
    (corpus, trained), (other, measured) = target.split()
    sizes = np.diff(read_bounds(corpus.prefix))[trained]
    text = f"{len(trained):,} documents, {int(sizes.sum()):,} tokens; median {int(np.median(sizes)):,}"
    kept = int(np.diff(read_bounds(other.prefix))[measured].sum())
    lines = [("training text", f"{text}, longest {int(sizes.max()):,}")]
    lines.append(("", f"{len(measured):,} documents of {kept:,} tokens validate"))
    return lines


def _sources(data: TextDataConfig) -> list[TextSource]:
    """What trains, and what validates where that is a text of its own."""
    named = [("data.path", data.path, data.split)]
    if data.validation_path is not None:
        named.append(("data.validation_path", data.validation_path, data.validation_split))
    return [
        TextSource(key=key, path=path, text_field=data.text_field, split=split, subset=data.subset)
        for key, path, split in named
    ]


def _refuse_overlap(target: TextTarget) -> None:
    trained, measured = target.split()
    shares = overlap_shares(trained, measured)
    found = np.flatnonzero(shares > MOST_FOUND)
    if found.size:
        documents = measured[1]
        raise UserError(
            f"data.{'validation_path' if target.validation else 'path'}: of the {len(documents)} documents that "
            f"validate, {found.size} are in the training text too, with more than half of their {GRAM}-token pieces; "
            f"the first is document {documents[found[0]] + 1} ({shares[found[0]]:.0%}). Their loss would show what was "
            "learnt by heart: remove the copies, or write data.allow_overlap=true"
        )


def overlap_shares(trained: Selection, measured: Selection) -> npt.NDArray[np.float64]:
    """Of each measured document, the part of its 13-token pieces that the training documents contain; 0 where it is
    shorter than one (arXiv 2005.14165, appendix C, has the length)."""
    documents = [_grams(ids) for ids in _documents(*measured)]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *documents]))
    seen = np.zeros(len(known), dtype=bool)
    for ids in _stretches(*trained):
        grams = _grams(ids)
        places = np.minimum(np.searchsorted(known, grams), max(0, len(known) - 1))
        seen[places[known[places] == grams] if len(known) else []] = True
    found = [seen[np.searchsorted(known, grams)] for grams in documents]
    return np.array([hits.mean() if len(hits) else 0.0 for hits in found])


def _documents(corpus: Corpus, documents: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.uint64]]:
    """Without their end-of-text."""
    ids, bounds = read_ids(corpus.prefix), read_bounds(corpus.prefix)
    for number in documents:
        yield ids[bounds[number] : bounds[number + 1] - 1].astype(np.uint64)


def _stretches(corpus: Corpus, documents: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.uint64]]:
    """Neighbouring documents together, in pieces that overlap by what a gram may straddle."""
    ids, bounds = read_ids(corpus.prefix), read_bounds(corpus.prefix)
    breaks = np.flatnonzero(np.diff(documents) != 1) + 1
    for run in np.split(documents, breaks):
        start, stop = int(bounds[run[0]]), int(bounds[run[-1] + 1])
        for first in range(start, stop, CHUNK):
            yield ids[first : min(stop, first + CHUNK + GRAM - 1)].astype(np.uint64)


def _grams(ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of every 13 tokens in a row."""
    count = len(ids) - GRAM + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(GRAM):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + count] + np.uint64(1)
    return hashes


def _corpus(plain: dict[str, Any]) -> Corpus:
    return Corpus(**{**plain, "counts": Counts(**plain["counts"])})
