"""The lines of a run's metrics.jsonl."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from typing import Any

from qwen_cl.runs.folder import RunFolder

TARGET = "val/target"
"""What the metrics of the target's own validation set start with."""

RETENTION = "retention/"
BITS, LOSS = "bits_per_byte", "loss"


WARM_UP = 5
"""Logged steps that throughput does not count."""


class MetricsTail:
    """What was written to metrics.jsonl since the last look."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._offset, self._inode = 0, 0

    def new_records(self) -> list[dict[str, Any]]:
        try:
            with self.folder.metrics_file.open("rb") as stream:
                if (inode := os.fstat(stream.fileno()).st_ino) != self._inode:  # cut back, by a run that went on
                    self._inode, self._offset = inode, 0
                stream.seek(self._offset)
                whole, _, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        if not whole:
            return []
        self._offset += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines()]


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl: none before the first, and without a line that is still being written."""
    return MetricsTail(folder).new_records()


def median_rate(training: list[dict[str, Any]]) -> float | None:
    """Tokens per second of the median step; ``training`` are the lines of metrics.jsonl with a training loss."""
    rates = [record["throughput/tokens_per_second"] for record in training]
    return statistics.median(rates[min(WARM_UP, len(rates) - 1) :]) if rates else None


@dataclass(frozen=True, slots=True)
class Curve:
    """One named set over the steps it was measured at."""

    name: str
    steps: list[int]
    values: list[float]
    unit: str
    """``bits_per_byte``, or ``loss`` where a set has no text (random tokens)."""

    @property
    def change(self) -> float:
        """From the first measurement to the last; above 0 is worse."""
        return self.values[-1] - self.values[0]


def read_curves(records: list[dict[str, Any]], unit: str = BITS) -> list[Curve]:
    """The target's first; ``records`` are the lines of metrics.jsonl."""
    names = [key.rpartition("/")[0] for record in records for key in record if key.endswith(f"/{LOSS}")]
    measured = [name for name in dict.fromkeys(names) if name == TARGET or name.startswith(RETENTION)]
    curves = []
    for name in sorted(measured, key=lambda name: name != TARGET):
        key = f"{name}/{unit}" if any(f"{name}/{unit}" in record for record in records) else f"{name}/{LOSS}"
        points = [(record["step"], record[key]) for record in records if key in record]
        steps, values = (list(column) for column in zip(*points))
        curves.append(Curve(name.removeprefix(RETENTION), steps, values, key.rpartition("/")[2]))
    return curves
