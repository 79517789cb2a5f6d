"""The check that a tokenizer belongs to a model, and the hash of a tokenizer. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.generation_config import read_generation_config, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("eos", "bos", "pad")
PADDING_ROWS, PADDING_SHARE = 1024, 0.1
"""The rows, or the share of the tokenizer's size if that is more, that a vocabulary may have as padding: Qwen2.5 pads
151,665 to 152,064."""
OTHER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""The files of a tokenizer without a tokenizer.json."""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], directory: Path) -> None:
    """Check a tokenizer against the model's config.json (``config``) and its generation_config.json in ``directory``.

    Raises:
        UserError: The tokenizer has ids past the model's vocabulary, far fewer ids than the model has rows, or other
            special tokens than the model.
    """
    rows = int(config["vocab_size"])
    ids = max(tokenizer.get_vocab().values()) + 1
    if ids > rows:
        raise UserError(
            f"{directory}: its tokenizer has id {ids - 1}, past the model's vocab_size ({rows}); "
            "tokenizer and weights are not from the same model"
        )
    if rows - ids > max(PADDING_ROWS, PADDING_SHARE * ids):
        raise UserError(
            f"{directory}: the model's vocab_size ({rows}) has {rows - ids} rows more than its tokenizer has ids "
            f"({ids}), too many for padding; copy the tokenizer files of the model that the weights are from"
        )
    generation = read_generation_config(directory)
    for name in SPECIAL:
        _check_special(name, tokenizer, (config, generation), directory)


def _check_special(
    name: str, tokenizer: PreTrainedTokenizerBase, configs: tuple[dict[str, Any], ...], directory: Path
) -> None:
    """Check one special token; the model may name several (a chat model has more than one stop token) or none."""
    field = f"{name}_token_id"
    found = getattr(tokenizer, field)
    named = {token for config in configs for token in token_ids(config.get(field), field, directory)}
    if found is None or not named or found in named:
        return
    raise UserError(
        f"{directory}: its tokenizer's {name}_token is {getattr(tokenizer, f'{name}_token')!r} (id {found}), and "
        f"config.json and generation_config.json have {field} {', '.join(map(str, sorted(named)))}; copy the tokenizer "
        f"of the model that the weights are from, or set {field} in generation_config.json to what it was trained with"
    )


def tokenizer_hash(directory: Path) -> str | None:
    """Return the sha256 over vocabulary, merges and added tokens, independent of how tokenizer.json spells them.

    Without a tokenizer.json it is over the tokenizer's other files; None if there are none.

    Raises:
        UserError: The tokenizer.json cannot be read as one.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            content = _canonical(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a tokenizer: {error!r}; copy it again") from error
        return hashlib.sha256(content).hexdigest()
    files = [directory / name for name in OTHER_FILES if (directory / name).is_file()]
    if not files:
        return None
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def _canonical(plain: dict[str, Any]) -> bytes:
    """Return one form for both spellings of a merge: a pair in newer versions of tokenizers, a string in older ones."""
    model = plain["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    added = sorted((token["id"], token["content"]) for token in plain.get("added_tokens") or [])
    return json.dumps([model["vocab"], merges, added], sort_keys=True).encode()
