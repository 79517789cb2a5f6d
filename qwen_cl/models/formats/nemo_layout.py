"""The layout of a NeMo 2.0 checkpoint, and its context as plain data. No torch, no NeMo.

NeMo writes ``context/io.json``, a fiddle graph that it rebuilds by importing and calling what it names, and
``context/model.yaml``, the same values including defaults. Only the second is read here.
"""

from __future__ import annotations

import os
import re
import reprlib
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.formats.torch_dist_metadata import METADATA

SCHEME = "nemo://"
CONTEXT, WEIGHTS, MODEL = "context", "weights", "model.yaml"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
OWN_TOKENIZER = "tokenizer"
"""Folder of context/ for the files of a tokenizer if NeMo recorded only its name."""


def is_nemo_checkpoint(directory: Path) -> bool:
    """Return whether a directory has the layout of a NeMo checkpoint; its content is not checked."""
    layout = (directory / CONTEXT).is_dir() and (directory / WEIGHTS).is_dir()
    return layout and not (directory / "config.json").exists()


def nemo_directory(source: str) -> Path:
    """Return the directory of ``nemo://PATH``; a relative path is in NeMo's cache, as in NeMo.

    Raises:
        UserError: It is not a NeMo 2.0 checkpoint.
    """
    home = Path(os.environ.get("NEMO_HOME") or Path.home() / ".cache/nemo")
    cache = Path(os.environ.get("NEMO_MODELS_CACHE") or home / "models")
    path = os.path.expanduser(source.removeprefix(SCHEME))  # noqa: PTH111 - Path's raises on an unknown user
    directory = (cache / path).absolute()
    if not is_nemo_checkpoint(directory):
        raise UserError(
            f"model.source ({source}): {directory} is not a NeMo 2.0 checkpoint, a directory with {CONTEXT}/ and "
            f"{WEIGHTS}/; a relative nemo:// path is looked up in NEMO_MODELS_CACHE, any other works without nemo://"
        )
    return directory


def refuse_partial_checkpoint(directory: Path) -> None:
    """Refuse a part of a checkpoint, with a message that is not about Hugging Face's layout."""
    if (directory / "config.json").exists():
        return
    if (directory / METADATA).exists() or (directory / MODEL).exists():
        raise UserError(f"model.source ({directory}) is a part of a NeMo 2.0 checkpoint; name the directory above it")
    if (directory / WEIGHTS / METADATA).exists() and not (directory / CONTEXT).is_dir():
        raise UserError(
            f"model.source ({directory}) has {WEIGHTS}/ but not {CONTEXT}/, which describes the model; copy the "
            "complete checkpoint"
        )


def refuse_other_kinds(directory: Path) -> None:
    """Refuse adapters and quantized models.

    Directories in Hugging Face layout are checked too, as NeMo unpickles ModelOpt's file in any directory with weights.
    """
    for folder in (directory, directory / WEIGHTS):
        if (folder / "modelopt_state").exists():
            raise UserError(
                f"model.source ({directory}) is a model quantized or pruned with ModelOpt (it has modelopt_state), "
                "which is not supported; use the checkpoint it was made from"
            )
        if (folder / "adapter_metadata.json").exists():
            raise UserError(
                f"model.source ({directory}) is the checkpoint of an adapter alone; merge it into its base first "
                "(task=export does for a run's, llm.peft.merge_lora for NeMo's), or name the base"
            )


def read_model_yaml(directory: Path) -> tuple[dict[str, Any], Path]:
    import yaml

    path = directory / CONTEXT / MODEL
    try:
        # The safe loader refuses tags that name Python objects, so only plain data is accepted.
        model = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, which describes the model; copy the complete checkpoint with {CONTEXT}/"
        ) from error
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as plain YAML: {reason}") from error
    if not isinstance(model, dict):
        raise UserError(f"{path} must hold the fields of a model")
    return model, path


def tokenizer_directory(directory: Path) -> Path:
    """Return the folder of a model's tokenizer files; in Hugging Face layout, that of its weights.

    Raises:
        UserError: NeMo recorded only its name, or it is not a Hugging Face tokenizer.
    """
    if not is_nemo_checkpoint(directory):
        return directory
    model, path = read_model_yaml(directory)
    context = directory / CONTEXT
    tokenizer = model.get("tokenizer")
    recorded = tokenizer.get("pretrained_model_name") if isinstance(tokenizer, dict) else None
    folders = [context / recorded] if isinstance(recorded, str) and _inside(context, recorded) else []
    for folder in [*folders, context / OWN_TOKENIZER]:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    local = context / OWN_TOKENIZER
    name = recorded.get("attr") if isinstance(recorded, dict) else None
    if isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"{path}: the tokenizer is recorded by its name, {name}, without its files; fetch them once: "
            f"hf download {name} --include 'tokenizer*' '*.jinja' config.json --local-dir {local}"
        )
    raise UserError(
        f"{path}: the checkpoint holds no files of a Hugging Face tokenizer (tokenizer: {short(tokenizer)}); put the "
        f"model's tokenizer.json and tokenizer_config.json into {local}"
    )


def _inside(context: Path, name: str) -> bool:
    return "\0" not in name and (context / name).resolve().is_relative_to(context.resolve())


def tokenizer_size(directory: Path) -> int:
    """Return the number of tokens, including added ones."""
    from tokenizers import Tokenizer

    path = tokenizer_directory(directory) / "tokenizer.json"
    try:
        return int(Tokenizer.from_file(str(path)).get_vocab_size())
    except Exception as error:  # tokenizers raises no narrower class
        raise UserError(f"{path} cannot be read as a tokenizer: {' '.join(str(error).split())[:200]}") from error


def short(value: Any) -> str:
    """Return a value as one short line for a message, even if YAML aliases make it huge."""
    text = " ".join((value if isinstance(value, str) else reprlib.repr(value)).split())
    return text if len(text) <= 80 else text[:77] + "…"
