"""A model's generation_config.json, with the stop tokens and settings of transformers' ``generate``. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError

FILE = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Return the model's generation_config.json; empty if it has none.

    Raises:
        UserError: The file is not a JSON object.
    """
    path = directory / FILE
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; copy it again, or remove it") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object; copy it again, or remove it")
    return config


def token_ids(value: Any, field: str, directory: Path) -> list[int]:
    """Return the ids in a field; -1 and null stand for no id."""
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int | None) for token in ids):
        raise UserError(f"{directory}: {field} ({value}) must be an id or a list of ids")
    return [token for token in ids if token is not None and token >= 0]


def write_generation_config(directory: Path, model: Path, stops: Sequence[int]) -> None:
    """Write the model's generation_config.json to ``directory``, with ``stops`` added to its stop tokens.

    Without that file transformers uses the tokens of config.json, so a new file names those too.
    """
    given = read_generation_config(model)
    settings = given or _tokens_of_config(model)
    named = token_ids(settings.get("eos_token_id"), "eos_token_id", model)
    ends = [*named, *(stop for stop in stops if stop not in named)]
    if ends == named:
        if given:
            shutil.copyfile(model / FILE, directory / FILE)
        return
    # If this is true, transformers may prefer the values of config.json.
    settings = {name: value for name, value in settings.items() if name != "_from_model_config"}
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    (directory / FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokens_of_config(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {name: config[name] for name in TOKENS if config.get(name) is not None}
