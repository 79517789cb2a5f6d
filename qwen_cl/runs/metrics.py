"""The lines of a run's metrics.jsonl."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from typing import Any

from qwen_cl.runs.folder import RunFolder

TARGET = "val/target"
"""Prefix of the metrics of the target's validation set."""

RETENTION = "retention/"
BITS, LOSS = "bits_per_byte", "loss"


WARM_UP = 5
"""Logged steps to skip in a throughput median."""


class MetricsTail:
    """The reader of what was appended to metrics.jsonl since the last read."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._offset, self._inode = 0, 0

    def new_records(self) -> list[dict[str, Any]]:
        try:
            with self.folder.metrics_file.open("rb") as stream:
                if (inode := os.fstat(stream.fileno()).st_ino) != self._inode:  # replaced, when the run resumed
                    self._inode, self._offset = inode, 0
                stream.seek(self._offset)
                complete_lines, _, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        if not complete_lines:
            return []
        self._offset += len(complete_lines) + 1
        return [json.loads(line) for line in complete_lines.splitlines()]


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, without a line that is still being written; none if there is no file."""
    return MetricsTail(folder).new_records()


def median_rate(training: list[dict[str, Any]]) -> float | None:
    """Return the tokens per second of the median step.

    ``training`` are the records of metrics.jsonl with a training loss.
    """
    rates = [record["throughput/tokens_per_second"] for record in training]
    return statistics.median(rates[min(WARM_UP, len(rates) - 1) :]) if rates else None


@dataclass(frozen=True, slots=True)
class Curve:
    """The metric of one evaluation set over the steps at which it was evaluated."""

    name: str
    steps: list[int]
    values: list[float]
    unit: str
    """``bits_per_byte``, or ``loss`` where a set has no text (random tokens)."""

    @property
    def change(self) -> float:
        """Difference between the last value and the first; above 0 is worse."""
        return self.values[-1] - self.values[0]


def read_curves(records: list[dict[str, Any]], unit: str = BITS) -> list[Curve]:
    """Return one curve per evaluation set, the target's first. ``records`` are those of metrics.jsonl."""
    names = [key.rpartition("/")[0] for record in records for key in record if key.endswith(f"/{LOSS}")]
    measured = [name for name in dict.fromkeys(names) if name == TARGET or name.startswith(RETENTION)]
    curves = []
    for name in sorted(measured, key=lambda name: name != TARGET):
        key = f"{name}/{unit}" if any(f"{name}/{unit}" in record for record in records) else f"{name}/{LOSS}"
        points = [(record["step"], record[key]) for record in records if key in record]
        steps, values = (list(column) for column in zip(*points))
        curves.append(Curve(name.removeprefix(RETENTION), steps, values, key.rpartition("/")[2]))
    return curves
