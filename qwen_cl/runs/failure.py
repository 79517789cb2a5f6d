"""The kinds of failure that end a run before it is complete. No torch."""

from __future__ import annotations

import enum
import errno
import re

from qwen_cl.config.errors import UserError

MEGATRON_NOT_FINITE = re.compile(r"Unexpected result (\w+) \(message='found (?:NaN|Inf) in local grad norm")
"""The error of Megatron's check of each gradient bucket before the optimizer step."""
FAILED_COLLECTIVE = re.compile(
    r"gloo|nccl|DistBackendError|DistNetworkError|DistStoreError|connection (was )?(closed|reset|refused)|broken pipe"
    r"|process ?group",
    re.IGNORECASE,
)
"""Errors of torch.distributed when another rank is gone."""


class FailureKind(str, enum.Enum):
    """The kind of failure that ended a run before it was complete. The run's reason has the details."""

    out_of_memory = "out_of_memory"
    """On a GPU, or on the host."""
    disk_full = "disk_full"
    not_finite = "not_finite"
    """A NaN or infinite loss or gradient."""
    rank_lost = "rank_lost"
    """A process was killed, or its machine went down."""
    collective_failed = "collective_failed"
    """Communication between ranks failed; where another rank failed too, that one is the cause."""
    hung = "hung"
    """No rank made progress."""
    invalid_input = "invalid_input"
    interrupted = "interrupted"
    """A stop request: Ctrl-C, a signal, a cancelled job."""
    time_limit = "time_limit"
    """task.max_time, or that of the job."""
    pruned = "pruned"
    """The sweep stopped a trial that performed worse than others; it is not run again."""
    error = "error"
    """Any other failure."""

    def __str__(self) -> str:
        return self.value


OLD_REASONS = (
    (re.compile(r"^pruned: "), FailureKind.pruned),
    (re.compile(r"OutOfMemoryError|the kernel was out of memory"), FailureKind.out_of_memory),
    (re.compile(r"no room for a checkpoint|the disk is full"), FailureKind.disk_full),
    (re.compile(r"FloatingPointError: "), FailureKind.not_finite),
    (re.compile(r"\b(was|were) hanging[:;]|^all ranks hang: "), FailureKind.hung),
    (re.compile(r"^task\.max_time is up"), FailureKind.time_limit),
    (re.compile(r"^stopped (on request|before training began|by SIG)"), FailureKind.interrupted),
    (re.compile(r"was killed by SIG|were killed by SIG"), FailureKind.rank_lost),
)
"""Reasons recorded by earlier versions, which recorded no kind."""


class SaveError(RuntimeError):
    """A checkpoint could not be written. Raised on every rank, whichever rank failed."""

    def __init__(self, reason: str, kind: FailureKind) -> None:
        super().__init__(reason)
        self.kind = kind


def failure_kind_of(error: BaseException) -> FailureKind:
    """Return the kind of failure of the exception that ended a rank's process."""
    name, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, SaveError):
        return error.kind
    if isinstance(error, UserError):
        return FailureKind.invalid_input
    if isinstance(error, FloatingPointError) or MEGATRON_NOT_FINITE.search(text):
        return FailureKind.not_finite
    if getattr(error, "errno", None) == errno.ENOSPC:
        return FailureKind.disk_full
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":  # torch's, which may not be imported yet
        return FailureKind.out_of_memory
    if FAILED_COLLECTIVE.search(f"{name}: {text}"):
        return FailureKind.collective_failed
    return FailureKind.error


def kind_of_old_reason(reason: str) -> FailureKind:
    """Return the kind of a failure that an earlier version recorded."""
    return next((kind for pattern, kind in OLD_REASONS if pattern.search(reason)), FailureKind.error)
