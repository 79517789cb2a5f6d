"""Leakage checks: overlap of the evaluation sets with the training data. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_cl.config.data import DataConfig, FileDataConfig, NearDuplicates, TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.data.eval_sets import NamedSet
from qwen_cl.data.fingerprints import Fingerprints
from qwen_cl.data.normalize import row_text
from qwen_cl.data.overlap import ComparedTexts, Comparison, Match, Overlap, refuse_overlap
from qwen_cl.data.rows import Row, RowFiles, row_location

TRAINING_SET = "the training set"
SHOWN = 3
"""Pairs that the data report names per set; finding a location reads the file again."""


@dataclass(frozen=True, slots=True)
class NearPairs:
    """The texts of an evaluation set that are near duplicates of training texts."""

    what: str
    """Plural name for messages, like ``validation rows``."""
    count: int
    of: int
    """Number of texts in the set."""
    moved: bool
    """The texts were moved to the training set."""
    examples: list[tuple[str, str]]
    """FILE:LINE of some, each with that of the closest training text."""


@dataclass(frozen=True, slots=True)
class LeakageReport:
    """The overlap of each evaluation set with the training data."""

    overlaps: list[Overlap]
    """Overlap of each set with the training data, after moving near duplicates."""
    moved: tuple[int, ...]
    """Indices of the texts of the validation set that were moved to training, ascending."""
    near: list[NearPairs]
    """Near duplicates of each set."""


def check_leakage(data: DataConfig, train: Sequence[ComparedTexts], measured: Sequence[ComparedTexts]) -> LeakageReport:
    """Return the overlap of each of ``measured``, the validation set first, with all of ``train``.

    Raises:
        UserError: an evaluated text is a training text, without ``data.allow_overlap``; or nearly so, with
            ``data.near_duplicates=refuse``; or moving near duplicates would leave nothing to validate on.
    """
    comparison = Comparison(train, measured)
    if not isinstance(data, FileDataConfig | TextDataConfig):  # the bundled demo sets
        refuse_overlap(comparison, "", exact_only=False)
        return LeakageReport(comparison.overlaps(), (), [])
    if not data.allow_overlap:
        refuse_overlap(comparison, ", or write data.allow_overlap=true", exact_only=True)
        if data.near_duplicates is NearDuplicates.refuse:
            refuse_overlap(comparison, ", or write data.near_duplicates=report", exact_only=False)
    found = [[match for match in comparison.matches(number) if not match.exact] for number in range(len(measured))]
    moves = not data.allow_overlap and data.near_duplicates is NearDuplicates.move
    if moves and measured and measured[0].can_move and found[0]:
        found[0] = comparison.move()
        if len(comparison.moved) == measured[0].count:
            raise UserError(
                f"{measured[0].locate(0)}: every {measured[0].name} is a near duplicate of a training text (like "
                f"{comparison.locate_trained(found[0][0].trained)[1]}), which leaves nothing to validate on; set "
                "data.validation_path, or write data.near_duplicates=report"
            )
        refuse_overlap(comparison, ", or write data.near_duplicates=report", exact_only=True)
        found[1:] = [
            [match for match in comparison.matches(number) if not match.exact] for number in range(1, len(measured))
        ]
    near = [
        _pairs(comparison, number, matches, moved=number == 0 and bool(comparison.moved))
        for number, matches in enumerate(found)
    ]
    return LeakageReport(comparison.overlaps(), tuple(sorted(comparison.moved)), near)


def _pairs(comparison: Comparison, number: int, matches: list[Match], *, moved: bool) -> NearPairs:
    side = comparison.measured[number]
    examples = [(side.locate(match.measured), comparison.locate_trained(match.trained)[1]) for match in matches[:SHOWN]]
    return NearPairs(side.plural, len(matches), side.count, moved, examples)


def training_rows(rows: Sequence[Row], files: RowFiles, fingerprints: Fingerprints) -> ComparedTexts:
    def locate(index: int) -> str:
        return row_location(files, index, validation=False)

    return ComparedTexts(TRAINING_SET, len(rows), fingerprints(map(row_text, rows)), locate)


def validation_rows(rows: Sequence[Row], files: RowFiles, fingerprints: Fingerprints) -> ComparedTexts:
    def locate(index: int) -> str:
        return row_location(files, index, validation=True)

    held_out = files.validation is None
    how = f"held out by data.validation_every ({files.validation_every})" if held_out else "which validates"
    return ComparedTexts(
        f"row, {how},",
        len(rows),
        fingerprints(map(row_text, rows)),
        locate,
        remove_from="the file" if held_out else "one side",
        plural="validation rows",
        can_move=held_out,
    )


def replayed(sets: Sequence[NamedSet], fingerprints: Fingerprints) -> list[ComparedTexts]:
    return [_set(f"replay.datasets.{named.name}", named, fingerprints) for named in sets]


def retained(sets: Sequence[NamedSet], fingerprints: Fingerprints) -> list[ComparedTexts]:
    return [
        _set(
            f"row of retention.eval_sets.{named.name}, which measures forgetting,",
            named,
            fingerprints,
            f"rows of retention.eval_sets.{named.name}",
        )
        for named in sets
    ]


def _set(name: str, named: NamedSet, fingerprints: Fingerprints, plural: str = "") -> ComparedTexts:
    texts = fingerprints(map(row_text, named.rows))
    return ComparedTexts(name, len(named.rows), texts, named.places.__getitem__, plural=plural)
