"""The two sides of a run's data, to be compared: what is trained on, and what is measured. No torch."""

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
"""Pairs that the data report names of each set: a place is found by reading its file again."""


@dataclass(frozen=True, slots=True)
class NearPairs:
    """Of one set that is measured, the texts that nearly repeat what is trained on."""

    what: str
    """The texts, for a person: ``validation rows``."""
    count: int
    of: int
    """Texts of the set."""
    moved: bool
    """They train, and no longer validate."""
    examples: list[tuple[str, str]]
    """Where some are, each with the place of the training text that it shares most with."""


@dataclass(frozen=True, slots=True)
class LeakageReport:
    overlaps: list[Overlap]
    """Of each set that is measured with what is trained on, after what was moved."""
    moved: tuple[int, ...]
    """Indices of those texts of the first set that train after all, in rising order."""
    near: list[NearPairs]
    """Of each set that is measured."""


def check_leakage(data: DataConfig, train: Sequence[ComparedTexts], measured: Sequence[ComparedTexts]) -> LeakageReport:
    """The overlap of each of ``measured``, of which the first validates, with all of ``train``.

    Raises:
        UserError: a text is on both sides, and ``data.allow_overlap`` does not say that it may be; or nearly, and
            ``data.near_duplicates`` says that it must not be; or nothing would be left to validate on.
    """
    comparison = Comparison(train, measured)
    if not isinstance(data, FileDataConfig | TextDataConfig):  # the embedded sets
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
                f"{measured[0].locate(0)}: every {measured[0].name} nearly repeats what is trained on (as "
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
            f"row of retention.eval_sets.{named.name}, which measures what is forgotten,",
            named,
            fingerprints,
            f"rows of retention.eval_sets.{named.name}",
        )
        for named in sets
    ]


def _set(name: str, named: NamedSet, fingerprints: Fingerprints, plural: str = "") -> ComparedTexts:
    texts = fingerprints(map(row_text, named.rows))
    return ComparedTexts(name, len(named.rows), texts, named.places.__getitem__, plural=plural)
