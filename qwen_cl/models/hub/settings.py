"""The settings for the Hub in the config group ``model``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qwen_cl.config.errors import UserError
from qwen_cl.config.model import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """The endpoint, the cache and offline mode; the defaults are huggingface_hub's, with its environment variables."""

    endpoint: str | None = None
    offline: bool = False
    cache: str | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> HubSettings:
        return cls(endpoint=model.endpoint, offline=model.offline, cache=model.cache)

    @property
    def url(self) -> str | None:
        return self.endpoint.rstrip("/") if self.endpoint else None

    @property
    def is_offline(self) -> bool:
        from huggingface_hub import constants

        return self.offline or constants.HF_HUB_OFFLINE

    @property
    def cache_directory(self) -> Path:
        """Return the absolute path of the cache, as the ranks may start in another directory than the launcher."""
        from huggingface_hub import constants

        directory = os.path.expanduser(self.cache or constants.HF_HUB_CACHE)  # noqa: PTH111 - Path's raises
        if directory.startswith("~"):
            raise UserError(f"model.cache ({self.cache}): no such user; write the directory's path")
        if os.path.lexists(directory) and not os.path.isdir(directory):  # noqa: PTH112
            raise UserError(f"model.cache ({directory}) is not a directory")
        return Path(os.path.abspath(directory))  # noqa: PTH100 - Path's keeps ".."
