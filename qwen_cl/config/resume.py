"""The resume group: handling of a folder that already contains a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_cl.config.fields import Affects, setting


@dataclass(kw_only=True, slots=True)
class ResumeConfig:
    """A run that refuses a folder with a run."""


@dataclass(kw_only=True, slots=True)
class AutoResumeConfig(ResumeConfig):
    """A run that resumes from its latest valid checkpoint."""

    allow_changes: list[str] = field(metadata=setting(Affects.nothing))
    """Result-affecting keys and groups that may differ from the resumed run."""
