"""The two sides of a run's data, to be compared: what is trained on, and what is measured. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_cl.config.data import DataConfig, FileDataConfig, TextDataConfig
from qwen_cl.data.fingerprints import Fingerprints
from qwen_cl.data.named_sets import NamedSet
from qwen_cl.data.normalisation import row_text
from qwen_cl.data.overlap import Compared, Overlap, find_overlaps, refuse_overlap
from qwen_cl.data.rows import Row, RowFiles, row_location

TRAINING_SET = "the training set"


def hold_apart(data: DataConfig, train: Sequence[Compared], measured: Sequence[Compared]) -> list[Overlap]:
    """The overlap of each of ``measured`` with all of ``train``.

    Raises:
        UserError: there is one, and ``data.allow_overlap`` does not say that there may be.
    """
    overlaps = find_overlaps(train, measured)
    if not isinstance(data, FileDataConfig | TextDataConfig):  # the embedded sets
        refuse_overlap(overlaps, train, measured, "")
    elif not data.allow_overlap:
        refuse_overlap(overlaps, train, measured, ", or write data.allow_overlap=true")
    return overlaps


def training_rows(rows: Sequence[Row], files: RowFiles, fingerprints: Fingerprints) -> Compared:
    def locate(index: int) -> str:
        return row_location(files, index, validation=False)

    return Compared(TRAINING_SET, len(rows), fingerprints(map(row_text, rows)), locate)


def validation_rows(rows: Sequence[Row], files: RowFiles, fingerprints: Fingerprints) -> Compared:
    def locate(index: int) -> str:
        return row_location(files, index, validation=True)

    held_out = files.validation is None
    how = f"held out by data.validation_every ({files.validation_every})" if held_out else "which validates"
    remove_from = "the file" if held_out else "one side"
    return Compared(f"row, {how},", len(rows), fingerprints(map(row_text, rows)), locate, remove_from)


def replayed(sets: Sequence[NamedSet], fingerprints: Fingerprints) -> list[Compared]:
    return [_set(f"replay.sets.{named.name}", named, fingerprints) for named in sets]


def retained(sets: Sequence[NamedSet], fingerprints: Fingerprints) -> list[Compared]:
    return [
        _set(f"row of retention.sets.{named.name}, which measures what is forgotten,", named, fingerprints)
        for named in sets
    ]


def _set(name: str, named: NamedSet, fingerprints: Fingerprints) -> Compared:
    return Compared(name, len(named.rows), fingerprints(map(row_text, named.rows)), named.places.__getitem__)
