"""A model's tokenizer for NeMo."""

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
    """Return the tokenizer of a source; recipes use this because a reference, unlike a cache path, is portable.

    NeMo copies the tokenizer's whole directory into every checkpoint, so it is loaded from a temporary copy without
    the weights, which is removed when the process ends.
    """
    files = resolve(source, weights=False)
    parent = tempfile.mkdtemp(prefix="qwen_cl-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    directory = Path(parent) / "tokenizer"
    write_normalized_files(files.directory, directory)
    return AutoTokenizer(str(directory))


class _AsWritten:
    """A replacement of transformers' AutoTokenizer, with what NeMo calls of it."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str, **options: Any) -> Any:
        return load_as_written(pretrained_model_name_or_path, **options)


# With transformers 5, NeMo's registry (nemo/lightning/io/registry.py) fails at an import that was removed. Without the
# tracking that it would have added to this class, the first checkpoint's context cannot be written.
if not hasattr(AutoTokenizer, "__io_artifacts__"):
    io.track_io(AutoTokenizer, artifacts=[DirOrStringArtifact("pretrained_model_name", required=False)])
replace(auto_tokenizer, "AUTOTOKENIZER", _AsWritten)
