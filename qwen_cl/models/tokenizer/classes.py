"""The transformers class that a tokenizer's files name, and the special tokens it adds. No torch."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.families import DEFAULT_TOKENIZER, FAMILIES
from qwen_cl.models.tokenizer.files import BACKEND, CONFIG

PLAIN = "PreTrainedTokenizerFast"
AS_WRITTEN = (
    PLAIN,
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "PythonBackend",
    "MistralCommonBackend",
    "MistralCommonTokenizer",
)
"""The classes that add nothing to tokenizer.json."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def is_by_transformers5(config: dict[str, Any]) -> bool:
    """Return whether transformers 5 wrote a tokenizer_config.json."""
    return (
        "backend" in config
        or config.get("tokenizer_class") == "TokenizersBackend"
        or isinstance(config.get("extra_special_tokens"), list)
    )


def class_name(config: dict[str, Any], model: dict[str, Any], by_transformers5: bool, directory: Path) -> str:
    """Return the name of the tokenizer's class, without Fast except in ``PreTrainedTokenizerFast``."""
    family = FAMILIES.get(str(model.get("model_type")))
    if by_transformers5 and family is not None and family.tokenizer_always:
        return family.tokenizer
    default = DEFAULT_TOKENIZER if family is None else family.tokenizer
    name = config.get("tokenizer_class") or model.get("tokenizer_class") or default
    if name in AS_WRITTEN:
        return str(name)
    if not isinstance(name, str) or _class(name) is None:
        import transformers

        if "auto_map" in config:
            raise UserError(
                f"{directory / CONFIG}: tokenizer_class ({name}) needs code of the model's own (auto_map), which is "
                "never run; use a model whose tokenizer is one of transformers'"
            )
        raise UserError(
            f"{directory / CONFIG}: tokenizer_class ({name}) is not in transformers {transformers.__version__}; if "
            f"{BACKEND} is complete without it, set tokenizer_class to {PLAIN}"
        )
    return name.removesuffix("Fast")


def _class(name: str) -> Any:
    import transformers

    for candidate in (f"{name.removesuffix('Fast')}Fast", name):
        found = getattr(transformers, candidate, None)
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedTokenizerBase):
            return found
    return None


def class_defaults(name: str) -> dict[str, Any]:
    """Return the special tokens of a class for files that name none."""
    if name in AS_WRITTEN:
        return {}
    parameters = inspect.signature(_class(name).__init__).parameters
    return {key: parameters[key].default for key in NAMED if key in parameters}
