"""The command line and Hydra's own state, read in launch.py alone and passed down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """A command as parsed by Hydra."""

    output_dir: Path
    overrides: Sequence[str]
    """Overrides with interpolations resolved."""
    typed: Sequence[str]
    """Overrides as typed."""
    runtime: Mapping[str, Any]
    """Hydra's runtime record: version, config sources, and the choice of each group."""

    @property
    def choices(self) -> Mapping[str, str]:
        """The choice of each group; empty if not recorded."""
        choices: Mapping[str, str] = self.runtime.get("choices", {})
        return choices
