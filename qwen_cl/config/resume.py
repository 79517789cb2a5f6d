"""What happens in a folder that holds a run already: the choices of the group ``resume``. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_cl.config.fields import Affects, setting


@dataclass(kw_only=True, slots=True)
class ResumeConfig:
    """Such a folder is refused."""


@dataclass(kw_only=True, slots=True)
class AutoResumeConfig(ResumeConfig):
    """The run goes on from its newest good checkpoint."""

    allow_changes: list[str] = field(metadata=setting(Affects.nothing))
    """Keys, and groups of keys, of those that matter to the result, that may differ from what the run was started
    with."""
