"""What the command line said beside the config: Hydra's own state, read in launch.py alone and passed down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """A command as Hydra understood it."""

    output_dir: Path
    overrides: Sequence[str]
    """Interpolations in them are resolved."""
    typed: Sequence[str]
    """The overrides as they were typed."""
    runtime: Mapping[str, Any]
    """Hydra's record of itself: its version, where the config came from, and what was chosen of each group."""

    @property
    def choices(self) -> Mapping[str, str]:
        """The choice of each group; empty where nothing recorded it."""
        choices: Mapping[str, str] = self.runtime.get("choices", {})
        return choices
