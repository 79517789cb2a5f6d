"""The model group: the source of the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import urlsplit

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Affects, Scope, setting


class VerifyMode(str, Enum):
    auto = "auto"
    none = "none"
    logits = "logits"


COMMIT_REFERENCE = re.compile(r"hf://[\w.-]+/[\w.-]+@[0-9a-f]{40}")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    source: str = field(metadata=setting(Affects.checkpoint))
    """``hf://ORG/NAME[@REVISION]``, a directory in Hugging Face layout, or a NeMo 2.0 checkpoint (a directory, or
    ``nemo://PATH``)."""
    adapter: str | None = field(metadata=setting(Affects.checkpoint))
    """Directory of a LoRA in PEFT's format to merge into the frozen model on loading, or None."""
    endpoint: str | None = field(metadata=setting(Affects.nothing, scope=Scope.access))
    """URL of the Hub or a mirror of it; None for HF_ENDPOINT, and without that huggingface.co."""
    offline: bool = field(metadata=setting(Affects.nothing, scope=Scope.access))
    """Take the model from the cache, without any request."""
    cache: str | None = field(metadata=setting(Affects.nothing, scope=Scope.access))
    """Cache directory of Hub files; None for the Hub's default."""
    require_pinned_revision: bool = field(metadata=setting(Affects.execution))
    """Refuse a source that does not name its commit."""
    verify: VerifyMode = field(metadata=setting(Affects.execution))
    """Before the first step, the loss of a few rows must be the base model's. ``logits`` compares with transformers;
    ``auto`` does so up to a billion parameters, and above only checks that the loss is below chance."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise UserError(
                "model.source is empty; write hf://ORG/NAME or the path of a directory in Hugging Face layout"
            )
        if self.require_pinned_revision and not COMMIT_REFERENCE.fullmatch(self.source):
            have = "names no commit" if self.source.startswith("hf://") else "is a directory, which has no commit"
            raise UserError(
                f"model.source ({self.source}) {have}, and model.require_pinned_revision=true takes nothing else; "
                "write hf://ORG/NAME@COMMIT with the 40 hex digits that a dry run without "
                "model.require_pinned_revision shows"
            )
        if self.adapter is not None and not self.adapter.strip():
            raise UserError("model.adapter is empty; name the directory of an adapter, or null for the model as it is")
        if self.cache is not None and not self.cache.strip():
            raise UserError("model.cache is empty; name a directory, or null for the Hub's own cache")
        if self.endpoint is not None:
            _require_endpoint(self.endpoint)


def _require_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise UserError(f"model.endpoint ({endpoint}) must be a URL such as https://hub.example.org/mirror")
    if "@" in parts.netloc:
        raise UserError(
            "model.endpoint must not hold a user or password: it is recorded; use `hf auth login` or HF_TOKEN"
        )
