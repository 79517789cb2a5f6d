"""The errors of huggingface_hub in the user's terms."""

from __future__ import annotations

from qwen_cl.config.errors import UserError
from qwen_cl.models.hub.http_errors import status_of


def refusal(error: BaseException, reference: str) -> UserError | None:
    """Return the error for a definite refusal by the Hub; None for other errors, which may be temporary."""
    from huggingface_hub import errors

    name = f"model.source ({reference})"
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{name} is gated: ask for access on its page, then `hf auth login` or set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name}: no such revision; name a branch, tag or commit of it")
    if isinstance(error, errors.DisabledRepoError):
        return UserError(f"{name}: the Hub has disabled this model; choose another")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{name}: no such model, or a private one; check the name, or `hf auth login` / HF_TOKEN")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{name}: {error}")
    if status_of(error) in (401, 403):
        return UserError(f"{name}: the Hub refused the token it was given; renew HF_TOKEN or `hf auth login`")
    return None
