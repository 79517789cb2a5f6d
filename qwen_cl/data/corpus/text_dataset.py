"""Raw text of a run: its training and validation corpora, and their overlap. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_cl.config.data import DocumentSeparator, TextDataConfig
from qwen_cl.data.corpus.cache import Corpus, Counts
from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.data.corpus.hub_dataset import is_hub_dataset, parse_reference
from qwen_cl.data.corpus.prepare import has_text_files, locate_document, prepare_corpus, source_content
from qwen_cl.data.corpus.selection import Part, Selection
from qwen_cl.data.corpus.split import cut_document, split_documents
from qwen_cl.data.fingerprints import token_fingerprints
from qwen_cl.data.overlap import ComparedTexts
from qwen_cl.data.raw_text import document_delimiters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTarget:
    """The corpora of a run, with their split; plain values by :meth:`plain`."""

    train: Corpus
    validation: Corpus | None
    """Validation corpus; None if it is held out of ``train``."""
    validation_share: float
    seed: int
    bos_id: int | None = None
    """BOS id of every document (``raw_text.Delimiters``)."""
    cut: tuple[int, int] | None = None
    """Training tokens of a single document, and bytes of its end, which validates."""
    moved: tuple[int, ...] = ()
    """Held-out documents that were moved to training, ascending (leakage.py)."""

    def split(self) -> tuple[Selection, Selection]:
        """Return the training and the validation selection."""
        if self.validation is not None:
            return _everything(self.train), _everything(self.validation)
        if self.cut is not None:
            return self._cut_in_two(*self.cut)
        trained, measured = split_documents(self.train.counts.documents, share=self.validation_share, seed=self.seed)
        trained, measured = np.union1d(trained, self.moved).astype(np.int64), np.setdiff1d(measured, self.moved)
        return Selection(self.train, trained), Selection(self.train, measured)

    def with_moved(self, numbers: Sequence[int]) -> TextTarget:
        """Move validation documents to training; ``numbers`` are their indices among the validation documents."""
        _, measured = self.split()
        return replace(self, moved=tuple(measured.documents[list(numbers)].tolist()) if numbers else ())

    def _cut_in_two(self, tokens: int, rest_bytes: int) -> tuple[Selection, Selection]:
        document = _everything(self.train)
        known = self.train.text_bytes(document.documents)
        rest = Part(tokens, int(document.lengths()[0]), None if known is None else rest_bytes)
        return replace(document, part=Part(0, tokens, None)), replace(document, part=rest)

    def lengths(self, selection: Selection) -> npt.NDArray[np.int64]:
        """Return the tokens of each document, with BOS and end-of-text."""
        return selection.lengths() + (self.bos_id is not None)

    @property
    def content(self) -> str:
        return self.train.content + (self.validation.content if self.validation else "")

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> TextTarget:
        corpora = {name: _corpus(plain[name]) if plain[name] else None for name in ("train", "validation")}
        cut = plain.get("cut")
        cut = None if cut is None else tuple(cut)
        return cls(**{**plain, **corpora, "cut": cut, "moved": tuple(plain.get("moved", ()))})


def prepare_target(data: TextDataConfig, seed: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TextTarget:
    """Prepare the corpora of a run; tokenizes what is not in the cache.

    Raises:
        UserError: a text is invalid.
        RunFailed: the tokenizing process died.
    """
    corpora = [
        prepare_corpus(source, tokenizer, vocab_size, workers=data.workers, cache=data.cache)
        for source in _sources(data)
    ]
    train, validation = corpora if len(corpora) == 2 else (corpora[0], None)
    cut = None
    if validation is None and train.counts.documents == 1:
        (ids,) = _everything(train).texts()
        cut = cut_document(ids, tokenizer, data.validation_fraction, f"data.path ({data.path})")
    return TextTarget(
        train=train,
        validation=validation,
        validation_share=data.validation_fraction,
        seed=seed,
        bos_id=document_delimiters(tokenizer).bos_id,
        cut=cut,
    )


def text_content(data: TextDataConfig) -> str:
    """Return the current ``TextTarget.content``, without tokenizing."""
    return "".join(source_content(source, cache=data.cache) for source in _sources(data))


def save_target(target: TextTarget, path: Path) -> None:
    path.write_text(json.dumps(target.plain(), indent=2) + "\n", encoding="utf-8")


def summarize_validation(target: TextTarget) -> tuple[str, str]:
    """Return a summary line for the terminal."""
    _, measured = target.split()
    lengths = target.lengths(measured)
    if measured.part is not None:
        return "", f"the last {int(lengths.sum()):,} tokens of the one document validate"
    return "", f"{len(lengths):,} documents of {int(lengths.sum()):,} tokens validate"


def resolve_separator(data: TextDataConfig) -> TextDataConfig:
    """Reset ``document_separator`` to ``file`` if no text file is split by it, so that it has no effect.

    Raises:
        UserError: a file does not exist.
    """
    used = any(has_text_files(source.path, source.key) for source in _sources(data))
    return data if used else replace(data, document_separator=DocumentSeparator.file)


def _sources(data: TextDataConfig) -> list[TextSource]:
    """Return the training source, and the validation source if there is one."""
    named = [("data.path", data.path, data.split)]
    if data.validation_path is not None:
        named.append(("data.validation_path", data.validation_path, data.validation_split))
    return [_source(data, key, path, split) for key, path, split in named]


def _source(data: TextDataConfig, key: str, path: str, split: str) -> TextSource:
    subset = data.subset
    if is_hub_dataset(path):
        reference = parse_reference(path, key)
        path, split, subset = reference.bare, reference.split or split, reference.subset or subset
    return TextSource(
        key=key,
        path=path,
        text_field=data.text_column,
        split=split,
        subset=subset,
        separator=data.document_separator,
    )


def documents_to_compare(
    target: TextTarget, data: TextDataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ComparedTexts, ComparedTexts]:
    """Return the training and validation documents for the leakage check."""
    trained, measured = target.split()
    sources = _sources(data)
    is_held_out = target.validation is None
    name = "document, which validates,"
    if is_held_out:
        what = "document" if target.cut is None else "end of the text"
        name = f"{what}, held out by data.validation_fraction ({data.validation_fraction:g}),"
    validation = replace(
        _compared(name, measured, sources[-1], tokenizer),
        remove_from="the text" if is_held_out else "one side",
        plural="validation documents",
        can_move=is_held_out and target.cut is None,
        repeats_headings=data.document_separator is not DocumentSeparator.file,
    )
    return _compared("the training text", trained, sources[0], tokenizer), validation


def _compared(name: str, selection: Selection, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> ComparedTexts:
    documents = selection.documents

    def locate(index: int) -> str:
        return locate_document(source, int(documents[index]))

    return ComparedTexts(name, len(documents), token_fingerprints(selection.texts(), tokenizer), locate)


def _everything(corpus: Corpus) -> Selection:
    return Selection(corpus, np.arange(corpus.counts.documents))


def _corpus(plain: dict[str, Any]) -> Corpus:
    return Corpus(**{**plain, "counts": Counts(**plain["counts"])})
