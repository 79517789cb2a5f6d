"""Overlap detection: evaluated texts that are contained in the training data. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_cl.config.errors import UserError
from qwen_cl.data.fingerprints import GRAM, Fingerprint, Hashes

COMMON = 10
"""A 13-gram in more training texts than this is boilerplate and is ignored (arXiv 2005.14165, appendix C)."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """The overlap of an evaluation set with the training data. Indices start at 0."""

    texts: int
    """Number of evaluated texts."""
    exact: int
    """Number of texts identical to a training text."""
    by_grams: int
    """Number of other texts with more than half of their 13-grams in the training data."""
    first: tuple[int, int] | None
    """Index of the first such text, and of the training text it shares most with; None if there is none."""

    @property
    def found(self) -> int:
        return self.exact + self.by_grams


@dataclass(frozen=True, slots=True)
class ComparedTexts:
    """A named group of training or evaluation texts to compare."""

    name: str
    """Name in messages: ``the training set``; for evaluated texts what follows ``this``: ``row, which validates,``."""
    count: int
    fingerprints: Iterable[Fingerprint]
    locate: Callable[[int], str]
    """Returns the FILE:LINE of a text by its index."""
    remove_from: str = "one side"
    plural: str = ""
    """Plural name of evaluated texts in the data report, like ``validation rows``."""
    can_move: bool = False
    """The texts were held out of the training texts, and can be moved back."""
    repeats_headings: bool = False
    """The texts are pieces of files, with headings among them: an identical text of fewer than 13 tokens counts as a
    near duplicate, not as leakage."""


@dataclass(frozen=True, slots=True)
class Match:
    """An evaluated text that is contained in the training data."""

    measured: int
    trained: int
    """Index of the training text that it shares most with; moved texts come after all others."""
    exact: bool


def find_overlap(train: Iterable[Fingerprint], measured: Iterable[Fingerprint]) -> Overlap:
    """Return the overlap of ``measured`` with ``train``, which is streamed: memory grows with ``measured`` alone.

    A single shared 13-gram is a quotation; GPT-3's authors found that counting it "overly penalized long documents".
    More than half of them is an edited copy. Texts of fewer than 13 tokens are only compared for identity.
    """
    target = _Target(measured)
    for index, text in enumerate(train):
        target.see(index, text)
    return target.overlap()


class Comparison:
    """The matches of several evaluation sets with the training texts, whose indices run through all groups."""

    def __init__(self, train: Sequence[ComparedTexts], measured: Sequence[ComparedTexts]) -> None:
        self.train, self.measured = train, measured
        self.moved: list[int] = []
        """Indices of the texts of the first set that were moved to training, in the order of moving."""
        self._targets = [_Target(each.fingerprints, repeats_headings=each.repeats_headings) for each in measured]
        self._seen = 0
        for text in itertools.chain.from_iterable(each.fingerprints for each in train):
            self._see(text)

    def overlaps(self) -> list[Overlap]:
        return [target.overlap() for target in self._targets]

    def matches(self, number: int) -> list[Match]:
        """Return the matches of the evaluation set of this number."""
        return self._targets[number].matches()

    def move(self) -> list[Match]:
        """Move all matches of the first set to the training texts, repeatedly, since moved texts may match others.

        Returns:
            The matches that were moved."""
        target, found = self._targets[0], []
        while matches := target.matches():
            for match in matches:
                target.left.remove(match.measured)
                self.moved.append(match.measured)
                self._see(target.texts[match.measured])
            found += matches
        return found

    def locate_trained(self, index: int) -> tuple[str, str]:
        """Return the name and FILE:LINE of a training text."""
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
    """Refuse evaluation sets with matches, or with identical texts if ``exact_only``; ``advice`` ends the message.

    Raises:
        UserError: names the first pair and the number of matches."""
    for number, side in enumerate(comparison.measured):
        found = comparison.matches(number)
        first = next((match for match in found if match.exact or not exact_only), None)
        if first is None:
            continue
        overlap = comparison.overlaps()[number]
        name, where = comparison.locate_trained(first.trained)
        raise UserError(
            f"{side.locate(first.measured)}: this {side.name} is in {name} too ({where}), as are "
            f"{overlap.found} of {overlap.texts} ({overlap.exact} identical, {overlap.by_grams} with more than half of "
            f"their {GRAM}-grams); their loss would measure what is memorized: remove them from "
            f"{side.remove_from}{advice}"
        )


class _Target:
    """The evaluated texts of a set, with their matches in the training texts seen so far."""

    def __init__(self, texts: Iterable[Fingerprint], *, repeats_headings: bool = False) -> None:
        self.texts = list(texts)
        self.left = set(range(len(self.texts)))
        """Indices of the texts that have not been moved."""
        self.repeats_headings = repeats_headings
        self.exact: dict[bytes, int] = {}  # key -> index of the first training text that has it
        self.known_keys = {text.key for text in self.texts if text.key}
        self.known = np.unique(np.concatenate([np.zeros(0, np.uint64), *(text.grams for text in self.texts)]))
        self.seen_in: dict[int, dict[bytes, int]] = {}  # index in known -> key and index of the training texts with it

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
        """Return the training text with most of the grams, if more than half of the informative ones were seen."""
        found = [self.seen_in.get(place, {}) for place in np.searchsorted(self.known, grams).tolist()]
        informative = [texts for texts in found if len(texts) <= COMMON]
        shared = [texts for texts in informative if texts]
        if 2 * len(shared) <= len(informative) or not shared:
            return None
        counts: dict[int, int] = {}
        for index in itertools.chain.from_iterable(texts.values() for texts in shared):
            counts[index] = counts.get(index, 0) + 1
        return min(counts, key=lambda index: (-counts[index], index))
