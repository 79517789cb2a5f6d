"""The files of a model beside its weights: what a run keeps, and what an export carries on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qwen_cl.source.architecture import TIED, read_architecture
from qwen_cl.source.nemo_context import is_nemo_checkpoint, tokenizer_directory
from qwen_cl.source.reference import read_model_config
from qwen_cl.source.snapshot import FILES


def copy_small_files(source: Path, target: Path) -> None:
    """Config, tokenizer and chat template into ``target``, which is made; the files themselves where the Hub's cache
    has links. A NeMo checkpoint has the config of its model in NeMo's terms: here it gets Hugging Face's."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in FILES:
        for path in tokenizer_directory(source).glob(pattern):
            shutil.copyfile(path, target / path.name)
    config = read_model_config(source)
    own_head = bool(config.get(TIED)) and not read_architecture(config, source).tied_embeddings
    if own_head:  # where the weights are not, nothing but the flag can say it
        config[TIED] = False
    if own_head or is_nemo_checkpoint(source):
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
