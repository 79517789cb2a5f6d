"""Whether a validation set measures anything: how much of it is in the training set. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qwen_cl.config.errors import UserError
from qwen_cl.data.normalisation import normalise, text_key
from qwen_cl.data.rows import RowFiles, row_location

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GRAM = 13
"""Tokens in a row that two texts do not share by chance (arXiv 2005.14165, appendix C)."""
COMMON = 10
"""A gram in more training texts than this is a template or a formula and tells nothing (likewise)."""
CHUNK = 1000

Hashes = npt.NDArray[np.uint64]
Encode = Callable[[list[str]], list[list[int]]]
"""Token ids of each text, without special tokens and without tokens that are whitespace alone."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Indices are of the texts as they were given, from 0."""

    texts: int
    """Validation texts."""
    exact: int
    """Those whose whole text is a training text too."""
    by_grams: int
    """Others of whose 13-grams more than half are in the training set."""
    first: tuple[int, int] | None
    """The first of either: index of the validation text, and of a training text it shares most with."""

    @property
    def found(self) -> int:
        return self.exact + self.by_grams


def find_overlap(train: Iterable[str], validation: Sequence[str], encode: Encode) -> Overlap:
    """``train`` is read once and not kept: memory goes with the validation set alone.

    A single shared 13-gram is a quotation; GPT-3's authors found that counting it "overly penalized long documents".
    More than half of them is the text itself, edited. Texts of fewer than 13 tokens are compared whole only.
    """
    target = _Target(validation, encode)
    for index, key, grams in _described(train, encode):
        target.see(index, key, grams)
    return target.result()


def refuse_overlap(overlap: Overlap, files: RowFiles) -> None:
    """Raises UserError where anything was found, with the first pair."""
    if overlap.first is None:
        return
    validation, train = overlap.first
    held_out = files.validation is None
    raise UserError(
        f"{row_location(files, validation, validation=True)}: this row, "
        + (f"held out by data.validation_every ({files.validation_every}), " if held_out else "which validates, ")
        + f"is in the training set too ({row_location(files, train, validation=False)}), as are {overlap.found} of "
        f"{overlap.texts} ({overlap.exact} whole, {overlap.by_grams} by more than half of their {GRAM}-token pieces); "
        f"their loss would show what was learnt by heart: remove them from {'the file' if held_out else 'one side'}, "
        "or write data.allow_overlap=true"
    )


def content_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    blank: dict[int, bool] = {}

    def is_blank(token: int) -> bool:
        if token not in blank:
            blank[token] = not tokenizer.decode([token]).strip()
        return blank[token]

    def encode(texts: list[str]) -> list[list[int]]:
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[token for token in of_text if not is_blank(token)] for of_text in ids]

    return encode


class _Target:
    """The validation texts, and what of them the training texts so far contain."""

    def __init__(self, texts: Sequence[str], encode: Encode) -> None:
        self.keys: list[bytes] = []
        self.grams: list[Hashes] = []
        for _, key, grams in _described(texts, encode):
            self.keys.append(key)
            self.grams.append(grams)
        self.exact: dict[bytes, int] = {}  # key -> index of the first training text that has it
        self.known_keys = set(self.keys)
        self.known = np.unique(np.concatenate([np.zeros(0, np.uint64), *self.grams]))
        self.seen_in: list[dict[bytes, int]] = [{} for _ in self.known]

    def see(self, index: int, key: bytes, grams: Hashes) -> None:
        if key in self.known_keys:
            self.exact.setdefault(key, index)
        if not len(self.known):
            return
        places = np.searchsorted(self.known, grams)
        places[places == len(self.known)] = 0
        for place in places[self.known[places] == grams].tolist():
            texts = self.seen_in[place]
            if len(texts) <= COMMON:  # copies of one text count once
                texts.setdefault(key, index)

    def result(self) -> Overlap:
        exact = by_grams = 0
        first = None
        for number, (key, grams) in enumerate(zip(self.keys, self.grams)):
            match = self.exact.get(key)
            if match is not None:
                exact += 1
            elif (match := self._nearest(grams)) is not None:
                by_grams += 1
            if match is not None and first is None:
                first = number, match
        return Overlap(len(self.keys), exact, by_grams, first)

    def _nearest(self, grams: Hashes) -> int | None:
        """The training text with most of the grams, where more than half of those that tell something were seen."""
        found = [self.seen_in[place] for place in np.searchsorted(self.known, grams).tolist()]
        telling = [texts for texts in found if len(texts) <= COMMON]
        shared = [texts for texts in telling if texts]
        if 2 * len(shared) <= len(telling) or not shared:
            return None
        counts: dict[int, int] = {}
        for index in itertools.chain.from_iterable(texts.values() for texts in shared):
            counts[index] = counts.get(index, 0) + 1
        return min(counts, key=lambda index: (-counts[index], index))


def _described(texts: Iterable[str], encode: Encode) -> Iterator[tuple[int, bytes, Hashes]]:
    """Index, key and distinct grams."""
    numbered = enumerate(map(normalise, texts))
    while chunk := list(itertools.islice(numbered, CHUNK)):
        for (index, text), ids in zip(chunk, encode([text for _, text in chunk])):
            yield index, text_key(text), _gram_hashes(ids)


_FACTORS = np.random.default_rng(13).integers(0, 2**63, size=GRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def _gram_hashes(ids: list[int]) -> Hashes:
    """64 bits stand for a gram: two different ones meet less often than once in 10^13."""
    if len(ids) < GRAM:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, np.uint64), GRAM)
    return np.unique((windows * _FACTORS).sum(axis=1, dtype=np.uint64))
