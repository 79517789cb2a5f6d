"""The wandb group: what is logged to Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from qwen_cl.config.fields import Affects, setting
from qwen_cl.config.wandb_names import check_entity, check_project, check_tags


class WandbMode(str, Enum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


class LogAdapter(str, Enum):
    none = "none"
    reference = "reference"
    upload = "upload"


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    mode: WandbMode = field(metadata=setting(Affects.nothing))
    project: str = field(metadata=setting(Affects.nothing))
    entity: str | None = field(metadata=setting(Affects.nothing))
    tags: list[str] = field(metadata=setting(Affects.nothing))
    """Additional tags, beside model, adapter and data."""
    log_adapter: LogAdapter = field(metadata=setting(Affects.nothing))
    """Log the trained adapter as an artifact: ``reference`` its path, ``upload`` its files."""

    def __post_init__(self) -> None:
        check_project(self.project)
        check_entity(self.entity)
        check_tags(self.tags)
