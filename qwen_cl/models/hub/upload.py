"""The upload of an exported folder to the Hub. No torch."""

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
"""The patterns, by format, of weights that an earlier export may have left in the repository."""
MARKS = {"merged": "config.json", "adapter": "adapter_config.json"}


@dataclass(frozen=True, slots=True)
class Target:
    """The repository to upload to."""

    reference: str
    """hf://ORG/NAME"""
    repo: str
    endpoint: str | None
    format: str
    """merged or adapter"""
    public: bool
    """True if the repository exists and is public."""


def find_target(reference: str, endpoint: str | None, format: str) -> Target:
    """Check the name, the login and an existing repository's content before the export is written.

    Raises:
        UserError: The upload would fail.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    match = HUB_NAME.fullmatch(reference)
    assert match is not None, "checked by ExportConfig"
    repo = match["repo"]
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{KEY} ({reference}) is not a valid repository name: {_one_line(error)}") from error
    _require_write_access(reference, repo, _request(reference, endpoint, lambda api: api.whoami()))
    info = _request(reference, endpoint, lambda api: _existing(api, repo))
    if info is None:
        return Target(reference, repo, endpoint, format, public=False)
    existing = {sibling.rfilename for sibling in info.siblings or []}
    other = next(mark for name, mark in MARKS.items() if name != format)
    if other in existing and MARKS[format] not in existing:
        raise UserError(
            f"{KEY} ({reference}) holds {other}, so it is not a repository for task.format={format}, and with "
            "both transformers would load the wrong one; choose another name"
        )
    return Target(reference, repo, endpoint, format, public=not info.private)


def upload(target: Target, folder: Path) -> str:
    """Upload the folder, creating the repository as private if it does not exist; return the commit.

    Raises:
        RunFailed: The upload failed; the folder stays, and the message has the command to upload it again.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=target.endpoint)
    again = f"{folder} is complete; upload it with: {_upload_command(target, folder)}"
    try:
        api.create_repo(target.repo, exist_ok=True, private=True)
        done = api.upload_folder(
            repo_id=target.repo,
            folder_path=str(folder),
            commit_message="Upload what qwen_cl exported",
            delete_patterns=OUR_WEIGHTS[target.format],
        )
    # For a file that was not accepted, huggingface_hub raises RuntimeError; for LFS, ValueError.
    except request_errors(RuntimeError, ValueError, OSError) as error:
        raise RunFailed(f"{KEY} ({target.reference}): the upload failed: {_one_line(error)}. {again}") from error
    except KeyboardInterrupt:
        print(f"\n{KEY} ({target.reference}): the upload was interrupted. {again}", flush=True)
        raise
    commit: str = done.oid
    return commit


def _upload_command(target: Target, folder: Path) -> str:
    endpoint = f"HF_ENDPOINT={shlex.quote(target.endpoint)} " if target.endpoint else ""
    return f"{endpoint}hf upload {target.repo} {shlex.quote(str(folder))} --private"


def _request(reference: str, endpoint: str | None, question: Any) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(endpoint=endpoint)
    try:
        return question(api)
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"{KEY} ({reference}): not logged in; run `hf auth login`, or set HF_TOKEN to a token with write access"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{KEY} ({reference}): HF_HUB_OFFLINE=1 forbids it; unset it, or leave {KEY} out") from error
    except request_errors(ValueError) as error:  # ValueError: the response is not JSON
        status = status_of(error)
        if status in (401, 403):
            raise UserError(
                f"{KEY} ({reference}): the Hub refused the token it was given ({status}); renew HF_TOKEN or "
                "`hf auth login`"
            ) from error
        response = f"answered {status}" if status else f"did not answer ({reason_of(error)})"
        raise UserError(
            f"{KEY} ({reference}): the Hub ({api.endpoint}) {response}; check the network and HF_ENDPOINT, or leave "
            f"{KEY} out"
        ) from error


def _require_write_access(reference: str, repo: str, login: dict[str, Any]) -> None:
    token = (login.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(
            f"{KEY} ({reference}): the token is read-only; create one with write access, and renew HF_TOKEN"
        )
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
