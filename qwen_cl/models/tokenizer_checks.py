"""Whether a tokenizer and a model belong together, and which tokenizer it was. No torch."""

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
"""A vocabulary may be this much larger than its tokenizer, whichever is more: Qwen2.5 pads 151,665 to 152,064."""
OTHER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""What a tokenizer consists of where there is no tokenizer.json."""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], directory: Path) -> None:
    """``config`` is the model's config.json; its generation_config.json, if any, is in ``directory``.

    Raises:
        UserError: ids past the model's vocabulary, far more rows than ids, or other special tokens than the model's.
    """
    rows = int(config["vocab_size"])
    ids = max(tokenizer.get_vocab().values()) + 1
    if ids > rows:
        raise UserError(
            f"{directory}: its tokenizer has id {ids - 1}, past the model's vocab_size ({rows}); "
            "tokenizer and weights are not of the same model"
        )
    if rows - ids > max(PADDING_ROWS, PADDING_SHARE * ids):
        raise UserError(
            f"{directory}: the model's vocab_size ({rows}) has {rows - ids} rows more than its tokenizer has ids "
            f"({ids}), too many for padding; copy the tokenizer files of the model that the weights are of"
        )
    generation = read_generation_config(directory)
    for name in SPECIAL:
        _check_special(name, tokenizer, (config, generation), directory)


def _check_special(
    name: str, tokenizer: PreTrainedTokenizerBase, configs: tuple[dict[str, Any], ...], directory: Path
) -> None:
    """The model may name several (a chat model ends with more than one) or none; a tokenizer may have none."""
    field = f"{name}_token_id"
    found = getattr(tokenizer, field)
    named = {token for config in configs for token in token_ids(config.get(field), field, directory)}
    if found is None or not named or found in named:
        return
    raise UserError(
        f"{directory}: its tokenizer's {name}_token is {getattr(tokenizer, f'{name}_token')!r} (id {found}), and "
        f"config.json and generation_config.json have {field} {', '.join(map(str, sorted(named)))}; copy the tokenizer "
        f"of the model that the weights are of, or set {field} in generation_config.json to what it was trained with"
    )


def tokenizer_hash(directory: Path) -> str | None:
    """sha256 over what turns text into ids: vocabulary, merges and added tokens, however tokenizer.json spells them.
    Of a tokenizer without that file, over the files it has; None where there is none.

    Raises:
        UserError: tokenizer.json is none.
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
    """Newer versions of the library write a merge as a pair, older ones as one string."""
    model = plain["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    added = sorted((token["id"], token["content"]) for token in plain.get("added_tokens") or [])
    return json.dumps([model["vocab"], merges, added], sort_keys=True).encode()
