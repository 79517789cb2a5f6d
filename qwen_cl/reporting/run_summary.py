"""The runs of a folder as their own files tell them. No torch."""

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
    """The results of a run, whether it ended or not."""

    status: RunStatus
    training: list[tuple[int, float]]
    """Step and loss of every line of training."""
    target: Curve | None
    """Loss in nats per token; None before the first measurement."""
    retention: list[Curve]
    tokens_per_second: float | None
    """Of the median step."""

    @property
    def completed(self) -> bool:
        """With a target loss: in order to be compared."""
        return self.status.state is State.COMPLETED and self.loss is not None

    @property
    def loss(self) -> float | None:
        """Of the target, at its last measurement."""
        return _finite(self.target.values[-1]) if self.target else None

    @property
    def first_loss(self) -> float | None:
        return _finite(self.target.values[0]) if self.target else None

    @property
    def train_loss(self) -> float | None:
        """Of the last recorded step."""
        return _finite(self.training[-1][1]) if self.training else None

    @property
    def retention_losses(self) -> dict[str, float | None]:
        """By set, at its last measurement."""
        return {curve.name: _finite(curve.values[-1]) for curve in self.retention}

    @property
    def forgetting(self) -> float | None:
        """How much the losses of the retention sets rose since step 0, on average; None where none was measured."""
        return _finite(statistics.fmean(curve.change for curve in self.retention)) if self.retention else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary(Measurements):
    """A run as its folder tells it: what it was, and what it measured."""

    name: str
    overrides: dict[str, str]
    """As the user gave them, by key or group."""
    devices: int
    samples: list[Sample]


def read_measurements(folder: RunFolder) -> Measurements:
    """Read status.json and metrics.jsonl.

    Raises:
        ValueError: a line of metrics.jsonl is damaged.
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
    """Of every run in a folder of runs; the completed first, and the lower the target's loss the earlier.

    Raises:
        UserError: it holds none.
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
    """None for a folder of another kind: a chain has a status too, and trains nothing itself.

    Raises:
        UserError: a file of it is damaged.
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
    """Keys whose values are not the same in all trials, in the order they were said."""
    keys = dict.fromkeys(key for trial in trials for key in trial.overrides)
    return [key for key in keys if len({trial.overrides.get(key) for trial in trials}) > 1]


def number(text: str | None) -> float | None:
    """An override's value where it is one."""
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
    """Without a last line that is not whole: the run may be writing it."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines()]


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which neither compare nor are JSON."""
    return value if math.isfinite(value) else None
