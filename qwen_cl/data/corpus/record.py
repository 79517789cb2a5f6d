"""What every reader of files gives. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    fields: Mapping[str, Any]
    where: str
    """For messages: ``FILE``, ``FILE:LINE`` or ``FILE: row N``."""
    progress: int
    """Bytes of all files read up to its end, roughly; of a dataset on the Hub, rows."""
