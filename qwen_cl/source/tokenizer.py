"""A model's tokenizer as NeMo wants it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

from qwen_cl.source.normalized import write_normalized_files
from qwen_cl.source.reference import resolve


def load_tokenizer(source: str) -> AutoTokenizer:
    """What a recipe names: a reference means the same on every machine, which a path in a cache does not.

    NeMo copies the directory a tokenizer came from into every checkpoint, all of it. So it comes from a copy without
    the weights, which lasts as long as the process.
    """
    files = resolve(source, weights=False)
    parent = tempfile.mkdtemp(prefix="qwen_cl-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    directory = Path(parent) / "tokenizer"
    write_normalized_files(files.directory, directory)
    return AutoTokenizer(str(directory))
