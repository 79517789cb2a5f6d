"""The record of the base model in every checkpoint, and its comparison on resume. No torch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.formats.nemo_layout import tokenizer_directory
from qwen_cl.models.loading.base_adapter import read_adapter
from qwen_cl.models.reference import local_directory
from qwen_cl.models.tokenizer_checks import tokenizer_hash

logger = logging.getLogger(__name__)
BASE_RECORD = "base_model.json"
"""The file beside the weights with ``source`` (pinned, or an absolute path), ``tokenizer_hash`` (None if the source has
no tokenizer files) and, if an adapter was merged into the base, ``adapter``: its hash."""
ADAPTER_RECORD = "adapter_metadata.json"
"""NeMo's file in the checkpoint of an adapter."""


class BaseMismatchError(RuntimeError):
    """The error of a checkpoint that was trained on another base model than the recipe's."""


def record_base(weights: Path, source: str, adapter: str | None = None) -> None:
    """Write the record of the base; ``adapter`` is the directory of the adapter merged into it."""
    record = {"source": source, "tokenizer_hash": _tokenizer_hash(source)}
    if adapter is not None:
        record["adapter"] = _adapter_hash(adapter)
    (weights / BASE_RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def require_same_base(checkpoint: Path, source: str, adapter: str | None = None) -> None:
    """Compare a checkpoint's base with the recipe's; ``checkpoint`` is its directory, or that of its weights.

    Raises:
        BaseMismatchError: The checkpoint records another base than ``source`` with ``adapter``, or another tokenizer
            than the source has now.
    """
    record = recorded_base(checkpoint)
    if record is None:
        logger.warning("%s records no base model; it is resumed without comparing it with %s", checkpoint, source)
        return
    if record["source"] != source:
        raise BaseMismatchError(
            f"{checkpoint} was trained on {record['source']}, and the recipe restores {source}; restore from the "
            "first, or train in another folder"
        )
    if record.get("adapter") != _adapter_hash(adapter):
        raise BaseMismatchError(
            f"{checkpoint} was trained on {source} with {_describe_adapter(record.get('adapter'))}, and the recipe has "
            f"{_describe_adapter(_adapter_hash(adapter))}; restore the same, or train in another folder"
        )
    if record["tokenizer_hash"] not in (None, _tokenizer_hash(source)):
        raise BaseMismatchError(
            f"{checkpoint} was trained with another tokenizer than {source} has now: its vocabulary, merges or added "
            "tokens changed; put the old files back, or train in another folder"
        )


def recorded_base(checkpoint: Path) -> dict[str, Any] | None:
    """Return ``source``, ``tokenizer_hash`` and ``adapter``; None if the checkpoint was written without this hook."""
    weights = checkpoint / "weights" if (checkpoint / "weights").is_dir() else checkpoint
    for name, field in ((BASE_RECORD, "source"), (ADAPTER_RECORD, "model_ckpt_path")):
        if (weights / name).is_file():
            record = json.loads((weights / name).read_text(encoding="utf-8"))
            base = {"source": str(record[field]), "tokenizer_hash": record.get("tokenizer_hash")}
            return {**base, "adapter": record["adapter"]} if "adapter" in record else base
    return None


def _adapter_hash(adapter: str | None) -> str | None:
    return None if adapter is None else read_adapter(Path(adapter)).sha256


def _describe_adapter(adapter: str | None) -> str:
    return (
        "no adapter merged in" if adapter is None else f"an adapter merged in whose files have sha256 {adapter[:12]}…"
    )


def _tokenizer_hash(source: str) -> str | None:
    try:
        return tokenizer_hash(tokenizer_directory(local_directory(source)))
    except UserError:  # a NeMo checkpoint may name a tokenizer whose files are elsewhere
        return None
