"""An exported folder to the Hub. No torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import RunFailed, UserError
from qwen_cl.config.task.export import HUB_NAME
from qwen_cl.models.hub.http_errors import reason_of, request_errors, status_of

KEY = "task.push_to"
OUR_WEIGHTS = {"merged": ["model*.safetensors", "model.safetensors.index.json"], "adapter": ["adapter_model*"]}
"""By format: what an earlier export of other steps or shard sizes may have left in the repository."""
MARKS = {"merged": "config.json", "adapter": "adapter_config.json"}


@dataclass(frozen=True, slots=True)
class Target:
    reference: str
    """hf://ORG/NAME"""
    repo: str
    endpoint: str | None
    format: str
    """merged or adapter"""
    public: bool
    """It exists already, for all to see."""


def find_target(reference: str, endpoint: str | None, format: str) -> Target:
    """Before minutes of writing: the name, the login, and what is in the repository if there is one.

    Raises:
        UserError: the upload could not work.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    match = HUB_NAME.fullmatch(reference)
    assert match is not None, "checked by ExportConfig"
    repo = match["repo"]
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{KEY} ({reference}) is no name the Hub takes: {_one_line(error)}") from error
    _require_write_access(reference, repo, _ask(reference, endpoint, lambda api: api.whoami()))
    info = _ask(reference, endpoint, lambda api: _existing(api, repo))
    if info is None:
        return Target(reference, repo, endpoint, format, public=False)
    there = {sibling.rfilename for sibling in info.siblings or []}
    other = next(mark for name, mark in MARKS.items() if name != format)
    if other in there and MARKS[format] not in there:
        raise UserError(
            f"{KEY} ({reference}) holds {other}, so it is no repository of a task.format={format}, and with both "
            "transformers would load the wrong one; choose another name"
        )
    return Target(reference, repo, endpoint, format, public=not info.private)


def upload(target: Target, folder: Path) -> str:
    """Makes the repository, private if it is new; returns the commit.

    Raises:
        RunFailed: says how to upload the folder again, which stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=target.endpoint)
    again = f"{folder} is whole; upload it with: {_by_hand(target, folder)}"
    try:
        api.create_repo(target.repo, exist_ok=True, private=True)
        done = api.upload_folder(
            repo_id=target.repo,
            folder_path=str(folder),
            commit_message="Upload what qwen_cl exported",
            delete_patterns=OUR_WEIGHTS[target.format],
        )
    # Of a file that did not go through, huggingface_hub says RuntimeError; of LFS, ValueError.
    except request_errors(RuntimeError, ValueError, OSError) as error:
        raise RunFailed(f"{KEY} ({target.reference}): the upload failed: {_one_line(error)}. {again}") from error
    except KeyboardInterrupt:
        print(f"\n{KEY} ({target.reference}): the upload was interrupted. {again}", flush=True)
        raise
    commit: str = done.oid
    return commit


def _by_hand(target: Target, folder: Path) -> str:
    endpoint = f"HF_ENDPOINT={shlex.quote(target.endpoint)} " if target.endpoint else ""
    return f"{endpoint}hf upload {target.repo} {shlex.quote(str(folder))} --private"


def _ask(reference: str, endpoint: str | None, question: Any) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(endpoint=endpoint)
    try:
        return question(api)
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"{KEY} ({reference}): nobody is logged in; `hf auth login`, or HF_TOKEN with a token that may write"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{KEY} ({reference}): HF_HUB_OFFLINE=1 forbids it; unset it, or leave {KEY} out") from error
    except request_errors(ValueError) as error:  # ValueError: no JSON came
        status = status_of(error)
        if status in (401, 403):
            raise UserError(
                f"{KEY} ({reference}): the Hub refused the token it was given ({status}); renew HF_TOKEN or "
                "`hf auth login`"
            ) from error
        how = f"answered {status}" if status else f"did not answer ({reason_of(error)})"
        raise UserError(
            f"{KEY} ({reference}): the Hub ({api.endpoint}) {how}; check the network and HF_ENDPOINT, or leave "
            f"{KEY} out"
        ) from error


def _require_write_access(reference: str, repo: str, login: dict[str, Any]) -> None:
    token = (login.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(f"{KEY} ({reference}): the token may only read; make one that may write, and renew HF_TOKEN")
    if "orgs" not in login:
        return
    owners = [login.get("name"), *(org.get("name") for org in login["orgs"])]
    owner = repo.split("/")[0]
    if owner not in owners:
        raise UserError(
            f"{KEY} ({reference}): this login may not upload to {owner}; it may to {', '.join(map(str, owners))}"
        )


def _existing(api: Any, repo: str) -> Any:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo)
    except RepositoryNotFoundError:
        return None


def _one_line(error: BaseException) -> str:
    cause = f": {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else ""
    return " ".join(f"{error}{cause}".split())[:400]
