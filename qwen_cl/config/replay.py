"""The replay and retention groups: data against forgetting, and sets that measure it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen_cl.config.errors import UserError
from qwen_cl.config.validation import require

SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(kw_only=True, slots=True)
class ReplayConfig:
    """A run without replay."""


@dataclass(kw_only=True, slots=True)
class MixedReplayConfig(ReplayConfig):
    ratio: float
    """Fraction of the training tokens, between 0 and 1."""

    def __post_init__(self) -> None:
        require("replay.ratio", self.ratio, above=0, below=1)


@dataclass(kw_only=True, slots=True)
class FileReplayConfig(MixedReplayConfig):
    datasets: dict[str, str]
    """Path of each, by name: a file, a glob, a directory, or ``hf://datasets/ORG/NAME[@REVISION][#SPLIT]``."""
    weights: dict[str, float]
    """Weight of each set within the ratio, summing to 1; empty for equal weights."""

    def __post_init__(self) -> None:
        MixedReplayConfig.__post_init__(self)
        check_names("replay.datasets", self.datasets)
        if not self.datasets:
            raise UserError("replay.datasets is empty; write 'replay.datasets={english: old.jsonl}', or replay=none")
        if self.weights:
            _check_weights(self.weights, list(self.datasets))

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of the training tokens, by set."""
        weights = self.weights or dict.fromkeys(self.datasets, 1 / len(self.datasets))
        return {name: self.ratio * weight for name, weight in weights.items()}


@dataclass(kw_only=True, slots=True)
class GeneratedReplayConfig(MixedReplayConfig):
    """Self-generated replay: text sampled from the base model before training."""

    tokens: int
    temperature: float
    top_p: float
    max_length: int
    """Tokens of one sampled text."""
    batch_size: int

    def __post_init__(self) -> None:
        MixedReplayConfig.__post_init__(self)
        for name in ("tokens", "max_length", "batch_size"):
            require(f"replay.{name}", getattr(self, name), at_least=2 if name == "max_length" else 1)
        require("replay.temperature", self.temperature, above=0)
        require("replay.top_p", self.top_p, above=0, at_most=1)


@dataclass(kw_only=True, slots=True)
class RetentionConfig:
    eval_sets: dict[str, str]
    """Path of each set, by name, as for replay; evaluated at every validation to measure forgetting."""

    def __post_init__(self) -> None:
        check_names("retention.eval_sets", self.eval_sets)


def check_names(key: str, sets: dict[str, str]) -> None:
    """Refuse names that cannot be part of a metric's name, and empty paths. Raises UserError."""
    for name, path in sets.items():
        if not SET_NAME.fullmatch(name):
            raise UserError(f"{key}: {name!r} must be letters, digits, _ and - (it names the set's metrics)")
        if not path.strip():
            raise UserError(f"{key}.{name} is empty; name a file")


def _check_weights(weights: dict[str, float], names: list[str]) -> None:
    if sorted(weights) != sorted(names):
        raise UserError(
            f"replay.weights names {', '.join(weights) or 'nothing'}, and replay.datasets {', '.join(names)}; "
            "give every set a weight, or none for equal ones"
        )
    for name, weight in weights.items():
        require(f"replay.weights.{name}", weight, above=0)
    total = sum(weights.values())
    if abs(total - 1) > 1e-6:
        raise UserError(
            f"replay.weights sum to {total:g}; they must sum to 1 (replay.ratio says how much is replayed in all)"
        )
