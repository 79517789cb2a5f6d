"""The files of a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError

BACKEND, CONFIG, SPECIAL_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATES = "additional_chat_templates"
"""The folder of additional chat templates, ``NAME.jinja``."""


def chat_templates(directory: Path) -> list[Path]:
    """Return the chat template files in a directory."""
    return sorted([*directory.glob("*.jinja"), *directory.glob(f"{TEMPLATES}/*.jinja")])


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no file.

    Raises:
        UserError: The file is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object; copy it again")
    return found


def write_object(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
