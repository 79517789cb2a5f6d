"""The matrix of losses: a row before training and one after each stage, a column per set."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from qwen_cl.config.task.continual import ContinualConfig
from qwen_cl.continual.evaluation import StageLosses
from qwen_cl.continual.transfer import Transfer, measure_transfer
from qwen_cl.files.atomic import write_text
from qwen_cl.reporting.console import console_for_tables

VALUES = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}
MEASURES = {
    "average": "average after the last stage",
    "backward": "backward transfer (above 0: later stages helped)",
    "forward": "forward transfer (above 0: earlier stages helped)",
    "forgetting": "forgetting (above 0: worse than its best)",
}


def write_matrix(task: ContinualConfig, rows: Sequence[StageLosses], directory: Path, console: Console) -> None:
    """Write matrix.json and matrix.txt, and print the tables. ``rows`` begins with the one before training."""
    names = ["before", *(stage.name for stage in task.stages)]
    matrices = {value: [getattr(row, value) for row in rows] for value in VALUES}
    learned_in = [task.taught_in(name) for name in task.sets]
    measures = {
        value: measure_transfer(matrix, learned_in, higher_is_better=False) for value, matrix in matrices.items()
    }
    record: dict[str, Any] = {
        "rows": names,
        "sets": list(task.sets),
        "learned_in": [names[row] for row in learned_in],
        **matrices,
        "measures": {value: asdict(measure) for value, measure in measures.items()},
    }
    write_text(directory / "matrix.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    block = Group(
        *(_matrix_table(title, names, list(task.sets), matrices[value]) for value, title in VALUES.items()),
        _measures_table(measures),
    )
    text = io.StringIO()
    console_for_tables(text).print(block)
    write_text(directory / "matrix.txt", text.getvalue())
    console.print(block)


def _matrix_table(title: str, names: list[str], sets: list[str], matrix: list[list[float]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("after")
    for name in sets:
        table.add_column(name, justify="right")
    for name, row in zip(names, matrix):
        table.add_row(name, *(f"{value:.4f}" for value in row))
    return table


def _measures_table(measures: dict[str, Transfer]) -> Table:
    table = Table()
    table.add_column("measure")
    for value in measures:
        table.add_column(VALUES[value], justify="right")
    for name, title in MEASURES.items():
        found = [getattr(measure, name) for measure in measures.values()]
        table.add_row(title, *("-" if value is None else f"{value:.4f}" for value in found))
    return table
