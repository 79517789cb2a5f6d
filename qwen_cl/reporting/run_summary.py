"""The summaries of runs, read from the files of their folders."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from yaml import YAMLError

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Affects, affects
from qwen_cl.config.overrides import override_key
from qwen_cl.config.saved import read_overrides, read_plain
from qwen_cl.runs.folder import ARCHIVED, RunFolder
from qwen_cl.runs.metrics import LOSS, TARGET, Curve, median_rate, read_curves, read_metrics
from qwen_cl.runs.status import RunStatus, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A line of samples.jsonl."""

    step: int
    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """The metrics of a run, finished or not."""

    status: RunStatus
    training: list[tuple[int, float]]
    """Step and loss of every logged training step."""
    target: Curve | None
    """Validation loss in nats per token; None before the first validation."""
    retention: list[Curve]
    tokens_per_second: float | None
    """Throughput of the median step."""

    @property
    def completed(self) -> bool:
        """True if the run completed with a validation loss, so that it can be compared."""
        return self.status.state is State.COMPLETED and self.loss is not None

    @property
    def loss(self) -> float | None:
        """The last validation loss."""
        return _finite(self.target.values[-1]) if self.target else None

    @property
    def first_loss(self) -> float | None:
        """The first validation loss."""
        return _finite(self.target.values[0]) if self.target else None

    @property
    def train_loss(self) -> float | None:
        """The training loss of the last logged step."""
        return _finite(self.training[-1][1]) if self.training else None

    @property
    def retention_losses(self) -> dict[str, float | None]:
        """The last loss of each retention set."""
        return {curve.name: _finite(curve.values[-1]) for curve in self.retention}

    @property
    def forgetting(self) -> float | None:
        """The mean increase of the retention sets' losses since step 0; None without retention sets."""
        return _finite(statistics.fmean(curve.change for curve in self.retention)) if self.retention else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary(Measurements):
    """A run's metrics with its name and settings."""

    name: str
    overrides: dict[str, str]
    """The user's overrides, by key or group."""
    devices: int
    samples: list[Sample]


def read_measurements(folder: RunFolder) -> Measurements:
    """Read status.json and metrics.jsonl.

    Raises:
        ValueError: a line of metrics.jsonl is corrupted.
    """
    records = read_metrics(folder)
    curves = {curve.name: curve for curve in read_curves(records, LOSS)}
    training = [record for record in records if "train/loss" in record]
    return Measurements(
        status=folder.status(),
        training=[(record["step"], record["train/loss"]) for record in training],
        target=curves.pop(TARGET, None),
        retention=list(curves.values()),
        tokens_per_second=median_rate(training),
    )


def read_trials(sweep: Path) -> list[RunSummary]:
    """Read every run in a folder of runs, sorted: completed runs first, by validation loss.

    Raises:
        UserError: the folder holds no runs.
    """
    folders = [RunFolder(path.parent) for path in sweep.glob("*/status.json") if ARCHIVED not in path.parent.name]
    folders = [folder for folder in folders if folder.config.is_file()]
    trials = [trial for folder in folders if (trial := read_trial(folder)) is not None]
    if not trials:
        raise UserError(f"task.sweep ({sweep}) holds no runs: none of its folders has config.yaml and status.json")
    return sorted(trials, key=_place)


def _place(trial: RunSummary) -> tuple[bool, float, str]:
    return not trial.completed, float("inf") if trial.loss is None else trial.loss, trial.name


def read_trial(folder: RunFolder) -> RunSummary | None:
    """Read the run of a folder; None if it is of another task, as task=continual, which has a status too.

    Raises:
        UserError: a file of the folder is corrupted.
    """
    try:
        return _read(folder)
    except (AttributeError, KeyError, OSError, TypeError, ValueError, YAMLError) as error:
        raise UserError(f"{folder.directory} cannot be read as a run: {' '.join(repr(error).split())[:200]}") from error


def _read(folder: RunFolder) -> RunSummary | None:
    plain = read_plain(folder.config)
    if "max_steps" not in plain["task"]:
        return None
    measured = read_measurements(folder)
    return RunSummary(
        **{each.name: getattr(measured, each.name) for each in fields(measured)},
        name=folder.directory.name,
        overrides=_overrides(folder),
        devices=int(plain["cluster"]["devices"]),
        samples=[Sample(**line) for line in _lines(folder.samples)],
    )


def differing(trials: list[RunSummary]) -> list[str]:
    """Return the keys whose values differ between the trials, in the order of the overrides."""
    keys = dict.fromkeys(key for trial in trials for key in trial.overrides)
    return [key for key in keys if len({trial.overrides.get(key) for trial in trials}) > 1]


def number(text: str | None) -> float | None:
    """Return an override's value as a number, or None if it is not one."""
    try:
        return float(text or "")
    except ValueError:
        return None


def _overrides(folder: RunFolder) -> dict[str, str]:
    pairs = {override_key(text): text.partition("=")[2] for text in read_overrides(folder.directory) or []}
    return {
        key: value
        for key, value in pairs.items()
        if affects(key) is not Affects.nothing and key.partition(".")[0] != "hydra"
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines; the run may be writing the last one."""
    complete = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in complete.splitlines()]


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which neither compare nor are JSON."""
    return value if math.isfinite(value) else None
