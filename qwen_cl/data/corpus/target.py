"""The raw text of a run: what of which corpus trains and validates, and how much of one is in the other. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_cl.config.data import TextDataConfig
from qwen_cl.data.corpus.cache import Corpus, Counts
from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.data.corpus.prepare import locate_document, prepare_corpus, source_content
from qwen_cl.data.corpus.selection import Selection
from qwen_cl.data.corpus.split import held_out
from qwen_cl.data.fingerprints import of_tokens
from qwen_cl.data.overlap import Compared
from qwen_cl.data.raw_text import document_delimiters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTarget:
    train: Corpus
    validation: Corpus | None
    """None where it is held out of ``train``."""
    validation_share: float
    seed: int
    bos_id: int | None = None
    """What every document begins with (``raw_text.Delimiters``)."""

    def split(self) -> tuple[Selection, Selection]:
        """What trains, and what validates."""
        if self.validation is not None:
            return _everything(self.train), _everything(self.validation)
        trained, measured = held_out(self.train.counts.documents, share=self.validation_share, seed=self.seed)
        return Selection(self.train, trained), Selection(self.train, measured)

    def lengths(self, selection: Selection) -> npt.NDArray[np.int64]:
        """Tokens of each document, with its BOS and end-of-text."""
        return selection.lengths() + (self.bos_id is not None)

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
        UserError: a text is not as it must be.
        RunFailed: the process that tokenises died.
    """

    corpora = [
        prepare_corpus(source, tokenizer, vocab_size, workers=data.workers, cache=data.cache)
        for source in _sources(data)
    ]
    train, validation = corpora if len(corpora) == 2 else (corpora[0], None)
    return TextTarget(
        train=train,
        validation=validation,
        validation_share=data.validation_share,
        seed=seed,
        bos_id=document_delimiters(tokenizer).bos_id,
    )


def text_content(data: TextDataConfig) -> str:
    """``TextTarget.content`` of what is there now, without tokenising it."""
    return "".join(source_content(source, cache=data.cache) for source in _sources(data))


def save_target(target: TextTarget, path: Path) -> None:
    path.write_text(json.dumps(target.plain(), indent=2) + "\n", encoding="utf-8")


def summarise_validation(target: TextTarget) -> tuple[str, str]:
    """A line for the terminal."""
    _, measured = target.split()
    lengths = target.lengths(measured)
    return "", f"{len(lengths):,} documents of {int(lengths.sum()):,} tokens validate"


def _sources(data: TextDataConfig) -> list[TextSource]:
    """What trains, and what validates where that is a text of its own."""
    named = [("data.path", data.path, data.split)]
    if data.validation_path is not None:
        named.append(("data.validation_path", data.validation_path, data.validation_split))
    return [
        TextSource(key=key, path=path, text_field=data.text_column, split=split, subset=data.subset)
        for key, path, split in named
    ]


def compared_documents(
    target: TextTarget, data: TextDataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Compared, Compared]:
    """What trains, and what validates, to be compared."""
    trained, measured = target.split()
    sources = _sources(data)
    held_out = target.validation is None
    name = "document, which validates,"
    if held_out:
        name = f"document, held out by data.validation_share ({data.validation_share:g}),"
    return (
        _compared("the training text", trained, sources[0], tokenizer, "one side"),
        _compared(name, measured, sources[-1], tokenizer, "the text" if held_out else "one side"),
    )


def _compared(
    name: str, selection: Selection, source: TextSource, tokenizer: PreTrainedTokenizerBase, remove_from: str
) -> Compared:
    documents = selection.documents

    def locate(index: int) -> str:
        return locate_document(source, int(documents[index]))

    return Compared(name, len(documents), of_tokens(selection.texts(), tokenizer), locate, remove_from)


def _everything(corpus: Corpus) -> Selection:
    return Selection(corpus, np.arange(corpus.counts.documents))


def _corpus(plain: dict[str, Any]) -> Corpus:
    return Corpus(**{**plain, "counts": Counts(**plain["counts"])})
