"""A model's tokenizer as NeMo wants it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nemo.collections.common.tokenizers.huggingface import auto_tokenizer
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning import io
from nemo.lightning.io.artifact import DirOrStringArtifact

from qwen_cl.models.normalized import write_normalized_files
from qwen_cl.models.reference import resolve
from qwen_cl.models.tokenizer.normalized import load_as_written
from qwen_cl.patches.registry import replace


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


class _AsWritten:
    """transformers' AutoTokenizer, as far as NeMo calls it."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str, **options: Any) -> Any:
        return load_as_written(pretrained_model_name_or_path, **options)


# With transformers 5 NeMo's registry ends at an import that is no more (nemo/lightning/io/registry.py), and without
# what it would have done to this class the first checkpoint fails: it cannot be written into its context.
if not hasattr(AutoTokenizer, "__io_artifacts__"):
    io.track_io(AutoTokenizer, artifacts=[DirOrStringArtifact("pretrained_model_name", required=False)])
replace(auto_tokenizer, "AUTOTOKENIZER", _AsWritten)
