"""Whether what is measured means anything: how much of it is trained on. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_cl.config.errors import UserError
from qwen_cl.data.fingerprints import GRAM, Fingerprint, Hashes

COMMON = 10
"""A gram in more training texts than this is a template or a formula and tells nothing (arXiv 2005.14165, app. C)."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Indices are of the texts as they were given, from 0."""

    texts: int
    """Measured texts."""
    exact: int
    """Those whose whole text is a training text too."""
    by_grams: int
    """Others of whose 13-grams more than half are in the training set."""
    first: tuple[int, int] | None
    """The first of either: index of the measured text, and of a training text it shares most with."""

    @property
    def found(self) -> int:
        return self.exact + self.by_grams


@dataclass(frozen=True, slots=True)
class Compared:
    """Texts of one origin, on either side."""

    name: str
    """In the message: ``the training set``, or what follows ``this``: ``row, which validates,``."""
    count: int
    fingerprints: Iterable[Fingerprint]
    locate: Callable[[int], str]
    """FILE:LINE of a text by its index."""
    remove_from: str = "one side"


def find_overlap(train: Iterable[Fingerprint], measured: Iterable[Fingerprint]) -> Overlap:
    """``train`` is read once and not kept: memory goes with what is measured alone.

    A single shared 13-gram is a quotation; GPT-3's authors found that counting it "overly penalized long documents".
    More than half of them is the text itself, edited. Texts of fewer than 13 tokens are compared whole only.
    """
    return _find([train], [measured])[0]


def find_overlaps(train: Sequence[Compared], measured: Sequence[Compared]) -> list[Overlap]:
    """Of each of ``measured`` with all of ``train``, whose indices go on from one to the next."""
    return _find([each.fingerprints for each in train], [each.fingerprints for each in measured])


def refuse_overlap(
    overlaps: Sequence[Overlap], train: Sequence[Compared], measured: Sequence[Compared], advice: str
) -> None:
    """Raises UserError where anything was found, with the first pair. ``advice`` ends the message."""
    for overlap, side in zip(overlaps, measured):
        if overlap.first is None:
            continue
        index, trained = overlap.first
        for other in train:
            if trained < other.count:
                break
            trained -= other.count
        raise UserError(
            f"{side.locate(index)}: this {side.name} is in {other.name} too ({other.locate(trained)}), as are "
            f"{overlap.found} of {overlap.texts} ({overlap.exact} whole, {overlap.by_grams} by more than half of their "
            f"{GRAM}-token pieces); their loss would show what was learnt by heart: remove them from "
            f"{side.remove_from}{advice}"
        )


def _find(train: Sequence[Iterable[Fingerprint]], measured: Sequence[Iterable[Fingerprint]]) -> list[Overlap]:
    targets = [_Target(each) for each in measured]
    for index, text in enumerate(itertools.chain.from_iterable(train)):
        for target in targets:
            target.see(index, text)
    return [target.result() for target in targets]


class _Target:
    """The measured texts, and what of them the training texts so far contain."""

    def __init__(self, texts: Iterable[Fingerprint]) -> None:
        self.texts = list(texts)
        self.exact: dict[bytes, int] = {}  # key -> index of the first training text that has it
        self.known_keys = {text.key for text in self.texts if text.key}
        self.known = np.unique(np.concatenate([np.zeros(0, np.uint64), *(text.grams for text in self.texts)]))
        self.seen_in: dict[int, dict[bytes, int]] = {}  # place in known -> key and index of the texts that have it

    def see(self, index: int, text: Fingerprint) -> None:
        if text.key in self.known_keys:
            self.exact.setdefault(text.key, index)
        if not len(self.known):
            return
        places = np.searchsorted(self.known, text.grams)
        places[places == len(self.known)] = 0
        for place in places[self.known[places] == text.grams].tolist():
            texts = self.seen_in.setdefault(place, {})
            if len(texts) <= COMMON:  # copies of one text count once
                texts.setdefault(text.key, index)

    def result(self) -> Overlap:
        exact = by_grams = 0
        first = None
        for number, text in enumerate(self.texts):
            match = self.exact.get(text.key)
            if match is not None:
                exact += 1
            elif (match := self._nearest(text.grams)) is not None:
                by_grams += 1
            if match is not None and first is None:
                first = number, match
        return Overlap(len(self.texts), exact, by_grams, first)

    def _nearest(self, grams: Hashes) -> int | None:
        """The training text with most of the grams, where more than half of those that tell something were seen."""
        found = [self.seen_in.get(place, {}) for place in np.searchsorted(self.known, grams).tolist()]
        telling = [texts for texts in found if len(texts) <= COMMON]
        shared = [texts for texts in telling if texts]
        if 2 * len(shared) <= len(telling) or not shared:
            return None
        counts: dict[int, int] = {}
        for index in itertools.chain.from_iterable(texts.values() for texts in shared):
            counts[index] = counts.get(index, 0) + 1
        return min(counts, key=lambda index: (-counts[index], index))
