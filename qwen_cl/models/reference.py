"""The resolution of ``model.source`` to a directory of files and its commit.

It imports neither torch nor NeMo, because it runs before anything heavy.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.formats.nemo_config import read_nemo_config
from qwen_cl.models.formats.nemo_layout import (
    SCHEME,
    is_nemo_checkpoint,
    nemo_directory,
    refuse_other_kinds,
    refuse_partial_checkpoint,
)
from qwen_cl.models.formats.tensor_files import ADAPTER_CONFIG, GGUF, no_weights, weights_entry
from qwen_cl.models.hub.client import cached_directory, fetch_snapshot
from qwen_cl.models.hub.manifest import ModelManifest
from qwen_cl.models.hub.settings import HubSettings

HUB_REFERENCE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w-][\w.-]*(?:/[\w-][\w.-]*)*))?")
"""The pattern of a reference. No part of a revision starts with a dot, as in git, so its path stays in the cache."""
HUB_DEFAULTS = HubSettings()


@dataclass(frozen=True, slots=True)
class ModelFiles:
    source: str
    """The source in the recipe: ``hf://ORG/NAME@<40-hex commit>``, or the absolute path of a directory."""
    directory: Path
    commit: str | None
    """40-hex commit on the Hub; None for a local directory."""
    config: dict[str, Any]
    """The model's config.json; for a NeMo checkpoint, its equivalent."""
    manifest: ModelManifest | None = None
    """Files, sizes and license of the commit; None for a directory, and for a cache filled by other tools."""


def is_hub_reference(source: str) -> bool:
    return source.startswith("hf://")


def resolve(source: str, settings: HubSettings = HUB_DEFAULTS, *, weights: bool = True) -> ModelFiles:
    """Pin the reference to a commit, and download its files to the Hub's cache and verify them.

    With ``weights=False`` only the small files are fetched, as a dry run needs them.

    Raises:
        UserError: The reference is malformed, not found, unreachable, incomplete or damaged, or its config.json
            cannot be parsed.
    """
    if source.startswith(SCHEME):
        source = str(nemo_directory(source))
    if not is_hub_reference(source):
        directory = Path(os.path.expanduser(source)).absolute()  # noqa: PTH111 - Path's raises on an unknown user
        if directory.suffix == ".gguf" and directory.is_file():
            raise UserError(f"model.source ({source}): {GGUF}: use the safetensors of the model it was made from")
        if not source.strip() or not directory.is_dir():
            raise UserError(
                f"model.source ({source}) is not a directory; give one in Hugging Face layout, a NeMo 2.0 checkpoint, "
                "or hf://ORG/NAME"
            )
        return ModelFiles(str(directory), directory, None, read_model_config(directory))
    match = HUB_REFERENCE.fullmatch(source)
    if match is None:
        raise UserError(f"model.source ({source}) must read hf://ORG/NAME or hf://ORG/NAME@REVISION")
    snapshot = fetch_snapshot(match["repo"], match["revision"], settings, weights=weights)
    return ModelFiles(
        source=f"hf://{match['repo']}@{snapshot.commit}",
        directory=snapshot.directory,
        commit=snapshot.commit,
        config=read_model_config(snapshot.directory),
        manifest=snapshot.manifest,
    )


def local_directory(source: str) -> Path:
    """Return the directory of a resolved source, without a request; called by each rank of a run.

    The ranks find the cache through HF_HUB_CACHE, which the launcher sets for them.
    """
    match = HUB_REFERENCE.fullmatch(source)
    return cached_directory(match["repo"], match["revision"]) if match else Path(source)


def read_model_config(directory: Path) -> dict[str, Any]:
    refuse_other_kinds(directory)
    refuse_partial_checkpoint(directory)
    if is_nemo_checkpoint(directory):
        return read_nemo_config(directory)
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        names = {entry.name for entry in directory.iterdir()}
        if weights_entry(names) is None and (ADAPTER_CONFIG in names or any(name.endswith(".gguf") for name in names)):
            raise UserError(f"model.source ({directory}) {no_weights(names)}") from error
        raise UserError(
            f"{path} is missing: model.source must be in Hugging Face layout (config.json, tokenizer.json, "
            "*.safetensors)"
        ) from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    return config
