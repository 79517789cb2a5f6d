"""Records, the common output of all file readers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a file or dataset."""

    fields: Mapping[str, Any]
    where: str
    """Location for messages: ``FILE``, ``FILE:LINE`` or ``FILE: row N``."""
    progress: int
    """Approximate bytes of all files read up to its end; for a Hub dataset, rows."""
