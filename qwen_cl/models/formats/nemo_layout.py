"""The layout of a NeMo 2.0 checkpoint, and what its context says as plain data. No torch, no NeMo.

NeMo writes ``context/io.json``, a fiddle graph that it builds again by importing and calling what it names, and
``context/model.yaml``, the same values with every default spelled out. Only the second is read here.
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
"""Folder of context/ where a user may put the files of a tokenizer that NeMo recorded by name alone."""


def is_nemo_checkpoint(directory: Path) -> bool:
    """By its layout; whether it can be read is for the other functions to say."""
    layout = (directory / CONTEXT).is_dir() and (directory / WEIGHTS).is_dir()
    return layout and not (directory / "config.json").exists()


def nemo_directory(source: str) -> Path:
    """The directory behind ``nemo://PATH``; a relative one lies in NeMo's cache, as NeMo has it.

    Raises:
        UserError: no NeMo 2.0 checkpoint is there.
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


def refuse_half(directory: Path) -> None:
    """What looks like a part of a checkpoint, so that the message is not about Hugging Face's layout."""
    if (directory / "config.json").exists():
        return
    if (directory / METADATA).exists() or (directory / MODEL).exists():
        raise UserError(f"model.source ({directory}) is a part of a NeMo 2.0 checkpoint; name the directory above it")
    if (directory / WEIGHTS / METADATA).exists() and not (directory / CONTEXT).is_dir():
        raise UserError(
            f"model.source ({directory}) has {WEIGHTS}/ and no {CONTEXT}/, which says what they are; copy the whole "
            "checkpoint"
        )


def refuse_other_kinds(directory: Path) -> None:
    """Adapters and quantized models.

    Of a directory in Hugging Face layout too: NeMo unpickles ModelOpt's file in whatever directory weights come from.
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
        # The safe loader knows no tag that names Python: anything but plain data ends here.
        model = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, so nothing says what the weights are; copy the whole checkpoint, {CONTEXT}/ and all"
        ) from error
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as plain YAML: {reason}") from error
    if not isinstance(model, dict):
        raise UserError(f"{path} must hold the fields of a model")
    return model, path


def tokenizer_directory(directory: Path) -> Path:
    """Where the files of a model's tokenizer are; in Hugging Face layout, beside its weights.

    Raises:
        UserError: NeMo recorded its name and not its files, or it is not one of Hugging Face's.
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
    own = context / OWN_TOKENIZER
    name = recorded.get("attr") if isinstance(recorded, dict) else None
    if isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"{path}: the tokenizer is recorded by its name, {name}, without its files; fetch them once: "
            f"hf download {name} --include 'tokenizer*' '*.jinja' config.json --local-dir {own}"
        )
    raise UserError(
        f"{path}: the checkpoint holds no files of a Hugging Face tokenizer (tokenizer: {short(tokenizer)}); put the "
        f"model's tokenizer.json and tokenizer_config.json into {own}"
    )


def _inside(context: Path, name: str) -> bool:
    return "\0" not in name and (context / name).resolve().is_relative_to(context.resolve())


def tokenizer_size(directory: Path) -> int:
    """Tokens, with those that were added."""
    from tokenizers import Tokenizer

    path = tokenizer_directory(directory) / "tokenizer.json"
    try:
        return int(Tokenizer.from_file(str(path)).get_vocab_size())
    except Exception as error:  # tokenizers raises nothing more exact
        raise UserError(f"{path} cannot be read as a tokenizer: {' '.join(str(error).split())[:200]}") from error


def short(value: Any) -> str:
    """For a message: one line, and bounded, whatever YAML's aliases make of it."""
    text = " ".join((value if isinstance(value, str) else reprlib.repr(value)).split())
    return text if len(text) <= 80 else text[:77] + "…"
