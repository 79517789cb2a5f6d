"""The typed contents of status.json. No torch."""

from __future__ import annotations

import enum
import time
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar

from qwen_cl.config.renamed_keys import rename_status
from qwen_cl.runs.failure import FailureKind, kind_of_old_reason

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object of names and values",
}
Record = TypeVar("Record")


class State(str, enum.Enum):
    SUBMITTED = "SUBMITTED"
    """Waiting in a cluster's queue."""
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    PREEMPTED = "PREEMPTED"

    def __str__(self) -> str:
        return self.value


OPEN = (State.SUBMITTED, State.RUNNING)
"""The states of a run that has no final status yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """The Slurm job that a run was last submitted in."""

    cluster: str | None = None
    id: str | None = None
    """None for a run on this machine."""
    submitted: datetime | None = None
    nodes: str | None = None
    restarts: int = 0
    seconds_before: float = 0.0
    """Seconds of all starts before the last."""
    start: datetime | None = None
    """Time of the last start."""
    end: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbRecord:
    """The W&B run of a run."""

    mode: str | None = None
    reason: str | None = None
    """Why it is offline, or incomplete online."""
    id: str | None = None
    directory: str | None = None
    url: str | None = None
    sync: str | None = None
    """Command that uploads what was logged offline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """The record of a run. A field has its default where status.json lacks it or has null."""

    state: State | None = None
    """None where the folder holds no run."""
    reason: str | None = None
    """Why the run is not complete."""
    failure_kind: FailureKind | None = None
    retriable: bool = False
    """The failure was external to the run, so another attempt may succeed."""
    phase: str | None = None
    phase_started_at: dict[str, float] = field(default_factory=dict)
    """Seconds since 1970 at which each phase last began."""
    step: int = 0
    start: datetime | None = None
    end: datetime | None = None
    resume_from: str | None = None
    """Path of the checkpoint that the run resumed from; None if it started from the beginning."""
    resumed: list[dict[str, Any]] = field(default_factory=list)
    """Time, step and earlier state of each resumption."""
    job: JobRecord = JobRecord()
    wandb: WandbRecord = WandbRecord()
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Name, folder, start and state of each stage of task=continual."""
    model_source: str | None = None
    model_commit: str | None = None
    model_fingerprint: str | None = None
    model_adapter: str | None = None
    model_adapter_sha256: str | None = None
    data_sha256: str | None = None
    data_commits: dict[str, str] = field(default_factory=dict)
    """The commit of each dataset from the Hub, by its config key."""
    bos_token: str | None = None
    tokenizer_hash: str | None = None
    output_layer: str | None = None
    trainable_parameters: int | None = None
    speed_optimizations: dict[str, int] = field(default_factory=dict)
    """The number of modules that each one changed."""
    verified: dict[str, float] = field(default_factory=dict)
    """First losses of this run and of transformers on the same examples."""
    peak_memory_gib: float | None = None
    git_commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str | None = None

    @property
    def is_open(self) -> bool:
        return self.state in OPEN

    @property
    def seconds(self) -> float | None:
        """Seconds from start to end; None while the run is running."""
        return (self.end - self.start).total_seconds() if self.start and self.end else None


def now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def parse_status(record: Any) -> RunStatus:
    """Return the status that a file's JSON holds; unknown fields are ignored.

    Raises:
        ValueError: a field has a value of the wrong kind.
    """
    if not isinstance(record, dict):
        raise ValueError("it must be an object of names and values")
    record = rename_status(record)
    if "failure_kind" not in record and record.get("reason") and record.get("state") in ("FAILED", "PREEMPTED"):
        record["failure_kind"] = kind_of_old_reason(str(record["reason"]))
    return _typed(RunStatus, record)


def changed(record: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's JSON with these fields changed, and the start time of a new phase.

    Raises:
        TypeError: a field is unknown.
    """
    if unknown := changes.keys() - {each.name for each in fields(RunStatus)}:
        raise TypeError(f"status.json has no field {', '.join(sorted(unknown))}")
    before = rename_status(record)
    after = {**before, **{name: _plain(before.get(name), value) for name, value in changes.items()}}
    phase, last = ((each.get("phase") or "").partition(":")[0] for each in (after, before))  # a count may follow
    if phase != last:
        after["phase_started_at"] = {**before.get("phase_started_at", {}), phase: round(time.time(), 2)}
    return after


def _plain(before: Any, value: Any) -> Any:
    """Return the JSON of a field; unknown fields of a nested record are retained."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    fields = asdict(value)
    others = {name: each for name, each in (before or {}).items() if name not in fields}
    return {**others, **{name: each for name, each in fields.items() if each is not None}}


def _typed(kind: type[Record], record: Mapping[str, Any], prefix: str = "") -> Record:
    hints = HINTS[kind]
    known = {name: value for name, value in record.items() if name in hints and value is not None}
    return kind(**{name: _value(hints[name], value, prefix + name) for name, value in known.items()})


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Return the type of each field, without None and without the type of its items."""
    hints = {}
    for name, hint in typing.get_type_hints(kind).items():
        alone = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
        hints[name] = typing.get_origin(alone) or alone
    return hints


def _value(kind: Any, value: Any, key: str) -> Any:
    if is_dataclass(kind) and isinstance(value, dict):
        return _typed(typing.cast(type[Any], kind), value, f"{key}.")
    if kind is datetime:
        return _time(value, key)
    if issubclass(kind, enum.Enum):
        if value not in list(kind):
            raise ValueError(f"{key} ({value}) must be one of {', '.join(map(str, kind))}")
        return kind(value)
    wanted = int | float if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):  # True is an int for Python
        raise ValueError(f"{key} ({value}) must be {KINDS.get(kind, KINDS[dict])}")
    return value


def _time(value: Any, key: str) -> datetime:
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        found = None
    if found is None or found.tzinfo is None:
        raise ValueError(f"{key} ({value}) must be a time with its zone, like {now().isoformat()}")
    return found


HINTS: dict[type[Any], dict[str, Any]] = {kind: _hints(kind) for kind in (RunStatus, JobRecord, WandbRecord)}
