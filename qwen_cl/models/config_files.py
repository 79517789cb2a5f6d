"""The files of a model other than its weights, as its author wrote them; an export includes them."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen_cl.files.atomic_folder import atomic_directory
from qwen_cl.files.names import MODEL_FILES
from qwen_cl.models.architecture import TIED, read_architecture
from qwen_cl.models.formats.nemo_layout import is_nemo_checkpoint, tokenizer_directory
from qwen_cl.models.hub.snapshot import FILES
from qwen_cl.models.reference import read_model_config
from qwen_cl.models.tokenizer.files import chat_templates, write_object


def write_small_files(source: Path, target: Path) -> None:
    """Write config, tokenizer and chat templates to ``target``, replacing its content."""
    with atomic_directory(target, replace=True) as temporary:
        copy_small_files(source, temporary)


def copy_small_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and chat templates to ``target``, resolving the links of the Hub's cache.

    A NeMo checkpoint gets a config.json in Hugging Face's terms; one of our runs, the files that the run saved.
    """
    files = _files_of_run(source) or tokenizer_directory(source)
    for path in {path for pattern in FILES for path in files.glob(pattern)} | set(chat_templates(files)):
        copy = target / path.relative_to(files)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    config = read_model_config(source)
    own_head = bool(config.get(TIED)) and not read_architecture(config, source).tied_embeddings
    if own_head:  # the copy is without the weights, so only the flag can tell
        config[TIED] = False
    if own_head or not (target / "config.json").is_file():
        write_object(target / "config.json", config)


def _files_of_run(checkpoint: Path) -> Path | None:
    files = checkpoint.parent.parent / MODEL_FILES
    return files if is_nemo_checkpoint(checkpoint) and (files / "config.json").is_file() else None
