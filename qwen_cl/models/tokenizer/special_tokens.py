"""The special tokens in a tokenizer's files, in every form that transformers has written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.tokenizer.classes import NAMED
from qwen_cl.models.tokenizer.files import CONFIG


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The special tokens of a tokenizer, as text or as objects with flags."""

    named: dict[str, Any]
    """The tokens by attribute, such as eos_token."""
    extra: list[Any]
    model_specific: dict[str, Any]
    """The named tokens that only this tokenizer has, such as image_token."""

    def in_order(self, by_transformers5: bool) -> list[Any]:
        """Return the tokens in the order in which each version assigns new ids."""
        named, model_specific = self.named.values(), self.model_specific.values()
        return [*named, *model_specific, *self.extra] if by_transformers5 else [*named, *self.extra, *model_specific]


def read_special_tokens(
    config: dict[str, Any],
    special_map: dict[str, Any],
    defaults: dict[str, Any],
    by_transformers5: bool,
    directory: Path,
) -> SpecialTokens:
    """Read the special tokens; special_tokens_map.json has priority if tokenizer_config.json lists no added tokens.

    Raises:
        UserError: A token is not text, or a field that must list tokens does not.
    """
    found = config if "added_tokens_decoder" in config else {**config, **special_map}
    extra: Any = found.get("extra_special_tokens") or []
    model_specific = {**_object(found, "model_specific_special_tokens", directory)}
    if isinstance(extra, dict):
        extra, model_specific = [], {**model_specific, **extra}
    if by_transformers5:
        model_specific |= {
            key: found[key] for key in found if key.endswith("_token") and isinstance(found[key], str | dict)
        }
    special = SpecialTokens(
        named={key: found.get(key, defaults.get(key)) for key in NAMED},
        extra=extra or found.get("additional_special_tokens") or [],
        model_specific={key: value for key, value in model_specific.items() if key not in NAMED},
    )
    if not isinstance(special.extra, list):
        raise UserError(f"{directory / CONFIG}: extra_special_tokens ({special.extra}) must be a list of tokens")
    listed = [("extra_special_tokens", value) for value in special.extra]
    for key, value in [*special.named.items(), *special.model_specific.items(), *listed]:
        if not isinstance(content(value), str) and (value is not None or key not in NAMED):
            raise UserError(f"{directory / CONFIG}: {key} ({value}) must be the text of a token")
    return special


def _object(found: dict[str, Any], key: str, directory: Path) -> dict[str, Any]:
    value = found.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{directory / CONFIG}: {key} ({value}) must name tokens, each with its text")
    return value


def content(token: Any) -> Any:
    """Return a token's text, from either form."""
    return token.get("content") if isinstance(token, dict) else token
