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
class ComparedTexts:
    """Texts of one origin, on either side."""

    name: str
    """In the message: ``the training set``, or what follows ``this``: ``row, which validates,``."""
    count: int
    fingerprints: Iterable[Fingerprint]
    locate: Callable[[int], str]
    """FILE:LINE of a text by its index."""
    remove_from: str = "one side"
    plural: str = ""
    """In the data report, of texts that are measured: ``validation rows``."""
    can_move: bool = False
    """They are held out of the training texts, and might as well train."""
    repeats_headings: bool = False
    """Pieces of files, among which are headings and the like: a text of fewer than 13 tokens that is there twice is no
    text held out that was trained on, but counts as nearly the same."""


@dataclass(frozen=True, slots=True)
class Match:
    measured: int
    trained: int
    """Index of the training text that it shares most with; those that were moved come after all others."""
    exact: bool


def find_overlap(train: Iterable[Fingerprint], measured: Iterable[Fingerprint]) -> Overlap:
    """``train`` is read once and not kept: memory goes with what is measured alone.

    A single shared 13-gram is a quotation; GPT-3's authors found that counting it "overly penalized long documents".
    More than half of them is the text itself, edited. Texts of fewer than 13 tokens are compared whole only.
    """
    target = _Target(measured)
    for index, text in enumerate(train):
        target.see(index, text)
    return target.overlap()


class Comparison:
    """What of several sets that are measured the training texts contain, whose indices go on from one to the next."""

    def __init__(self, train: Sequence[ComparedTexts], measured: Sequence[ComparedTexts]) -> None:
        self.train, self.measured = train, measured
        self.moved: list[int] = []
        """Indices of those texts of the first set that train after all, in the order they were moved in."""
        self._targets = [_Target(each.fingerprints, repeats_headings=each.repeats_headings) for each in measured]
        self._seen = 0
        for text in itertools.chain.from_iterable(each.fingerprints for each in train):
            self._see(text)

    def overlaps(self) -> list[Overlap]:
        return [target.overlap() for target in self._targets]

    def matches(self, number: int) -> list[Match]:
        """Of the set of this number."""
        return self._targets[number].matches()

    def move(self) -> list[Match]:
        """Those of the first set that training texts contain are training texts from now on, and so are those that they
        contain in turn. Returns what was found of each."""
        target, found = self._targets[0], []
        while matches := target.matches():
            for match in matches:
                target.left.remove(match.measured)
                self.moved.append(match.measured)
                self._see(target.texts[match.measured])
            found += matches
        return found

    def locate_trained(self, index: int) -> tuple[str, str]:
        """Name and FILE:LINE of a training text."""
        for side in self.train:
            if index < side.count:
                return side.name, side.locate(index)
            index -= side.count
        return self.train[0].name, self.measured[0].locate(self.moved[index])

    def _see(self, text: Fingerprint) -> None:
        for target in self._targets:
            target.see(self._seen, text)
        self._seen += 1


def refuse_overlap(comparison: Comparison, advice: str, *, exact_only: bool) -> None:
    """Raises UserError where anything was found, or any whole text, with the first pair; ``advice`` ends the
    message."""
    for number, side in enumerate(comparison.measured):
        found = comparison.matches(number)
        first = next((match for match in found if match.exact or not exact_only), None)
        if first is None:
            continue
        overlap = comparison.overlaps()[number]
        name, where = comparison.locate_trained(first.trained)
        raise UserError(
            f"{side.locate(first.measured)}: this {side.name} is in {name} too ({where}), as are "
            f"{overlap.found} of {overlap.texts} ({overlap.exact} whole, {overlap.by_grams} by more than half of their "
            f"{GRAM}-token pieces); their loss would show what was learnt by heart: remove them from "
            f"{side.remove_from}{advice}"
        )


class _Target:
    """The measured texts, and what of them the training texts so far contain."""

    def __init__(self, texts: Iterable[Fingerprint], *, repeats_headings: bool = False) -> None:
        self.texts = list(texts)
        self.left = set(range(len(self.texts)))
        """Indices of those that are measured still."""
        self.repeats_headings = repeats_headings
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

    def matches(self) -> list[Match]:
        found = []
        for number in sorted(self.left):
            text = self.texts[number]
            if (trained := self.exact.get(text.key)) is not None:
                found.append(Match(number, trained, exact=len(text.grams) > 0 or not self.repeats_headings))
            elif (trained := self._nearest(text.grams)) is not None:
                found.append(Match(number, trained, exact=False))
        return found

    def overlap(self) -> Overlap:
        found = self.matches()
        exact = sum(match.exact for match in found)
        first = (found[0].measured, found[0].trained) if found else None
        return Overlap(len(self.left), exact, len(found) - exact, first)

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
