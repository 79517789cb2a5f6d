"""From ``model.source`` to a directory of files and the commit they are.

Imports neither torch nor NeMo: it runs before anything heavy.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError

HUB_REFERENCE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    source: str
    """As the recipe names it: ``hf://ORG/NAME@<40-hex commit>``, or the absolute path of a directory."""
    directory: Path
    commit: str | None
    """40-hex commit on the Hub; None for a directory of the user's own."""
    config: dict[str, Any]
    """The model's config.json."""


def is_hub_reference(source: str) -> bool:
    return source.startswith("hf://")


def resolve(source: str, *, weights: bool = True) -> ModelFiles:
    """Pin the reference to a commit and make its files present in the Hub's cache.

    With ``weights=False`` only the small files are fetched, which is what a dry run needs.

    Raises:
        UserError: the reference is malformed, absent, out of reach, or its config.json does not parse.
    """
    if not is_hub_reference(source):
        directory = Path(os.path.expanduser(source)).absolute()  # noqa: PTH111 - Path's raises on an unknown user
        if not source.strip() or not directory.is_dir():
            raise UserError(
                f"model.source ({source}) is not a directory; give one in Hugging Face layout, or hf://ORG/NAME"
            )
        return ModelFiles(str(directory), directory, None, read_model_config(directory))
    match = HUB_REFERENCE.fullmatch(source)
    if match is None:
        raise UserError(f"model.source ({source}) must read hf://ORG/NAME or hf://ORG/NAME@REVISION")
    commit, directory = _from_hub(match["repo"], match["revision"], weights=weights)
    return ModelFiles(f"hf://{match['repo']}@{commit}", directory, commit, read_model_config(directory))


def _from_hub(repo: str, revision: str | None, *, weights: bool) -> tuple[str, Path]:
    from huggingface_hub import constants, errors
    from requests.exceptions import RequestException

    name = f"hf://{repo}" + (f"@{revision}" if revision else "")
    wanted = FILES + WEIGHTS if weights else FILES
    try:
        # By the name the user gave, so that the cache learns which commit it stood for and can answer without a Hub.
        directory = _snapshot(repo, revision, wanted, from_cache=constants.HF_HUB_OFFLINE)
    except errors.GatedRepoError as error:
        raise UserError(
            f"model.source ({name}) is gated: ask for access on its page, then `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"model.source ({name}): no such revision; name a branch, tag or commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"model.source ({name}): no such model, or a private one; check the name, or `hf auth login` / HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"model.source ({name}) is not in the local cache and the Hub cannot be asked; connect once, "
            "or copy the model to a directory and write model=local model.source=DIRECTORY"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"model.source ({name}): {error}") from error
    except (errors.HfHubHTTPError, RequestException) as error:
        if getattr(error.response, "status_code", None) in (401, 403):
            raise UserError(
                f"model.source ({name}): the Hub refused the token it was given; renew HF_TOKEN or `hf auth login`"
            ) from error
        directory = _cached_or_unreachable(repo, revision, name, wanted, error)
    if weights and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"model.source ({name}): the local cache holds no *.safetensors of it: the Hub was not reached to fetch "
            "them, or the model has none; connect once, or write model=local model.source=DIRECTORY"
        )
    return directory.name, directory


def _cached_or_unreachable(repo: str, revision: str | None, name: str, wanted: list[str], error: Exception) -> Path:
    """No network is no reason to refuse a model that is whole in the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _snapshot(repo, revision, wanted, from_cache=True)
    except LocalEntryNotFoundError:
        raise UserError(
            f"model.source ({name}): the Hub did not answer ({type(error).__name__}) and the model is not in the "
            "cache; check the network and HF_ENDPOINT, or use a directory: model=local model.source=DIRECTORY"
        ) from error


def _snapshot(repo: str, revision: str | None, wanted: list[str], *, from_cache: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"], local_files_only=from_cache
        )
    )


def local_directory(source: str) -> Path:
    """The directory behind a resolved source, without a network: what each rank of the run calls."""
    match = HUB_REFERENCE.fullmatch(source)
    return _snapshot(match["repo"], match["revision"], FILES + WEIGHTS, from_cache=True) if match else Path(source)


def read_model_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: model.source must be in Hugging Face layout (config.json, tokenizer.json, "
            "*.safetensors)"
        ) from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    return config
