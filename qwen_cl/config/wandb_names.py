"""Checks of W&B names before a run starts, by the rules of its client and server."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from qwen_cl.config.errors import UserError

LONGEST_NAME, LONGEST_TAG = 128, 64
"""Maximum lengths in characters."""
NOT_IN_PATHS = "/\\#?%:"
"""Characters that W&B refuses in a project name, which is part of a URL."""
LINE_ENDS_AND_CONTROLS = ("Cc", "Zl", "Zp")
"""Unicode categories of refused characters."""


def check_project(project: str) -> None:
    entity, slash, rest = project.partition("/")
    if slash and entity.strip() and rest.strip() and not any(each in entity + rest for each in NOT_IN_PATHS):
        raise UserError(
            f"wandb.project ({project}) must hold none of {_listed()}; write the user or team by itself: "
            f"wandb.entity={entity} wandb.project={rest}"
        )
    _check_part("wandb.project", project, "choose another name")


def check_entity(entity: str | None) -> None:
    if entity is not None:
        _check_part("wandb.entity", entity, "write the name of a user or team, or null for your default")


def check_run_name(name: str | None) -> None:
    if name is not None:
        _check_text("name", name, LONGEST_NAME, "write another, or null for the task and the peft method")


def check_tags(tags: Sequence[str]) -> None:
    for tag in tags:
        if not 1 <= len(tag) <= LONGEST_TAG:
            raise UserError(f"wandb.tags ({tag!r}) must have 1 to {LONGEST_TAG} characters; shorten it")
        _check_text("wandb.tags", tag, LONGEST_TAG, "change it or leave it out")


def _check_part(key: str, value: str, fix: str) -> None:
    _check_text(key, value, LONGEST_NAME, fix)
    if any(each in value for each in NOT_IN_PATHS):
        raise UserError(f"{key} ({value}) must hold none of {_listed()}; {fix}")


def _check_text(key: str, value: str, longest: int, fix: str) -> None:
    if not value.strip():
        raise UserError(f"{key} ({value!r}) must not be empty; {fix}")
    if value != value.strip():
        raise UserError(f"{key} ({value!r}) must not begin or end with blanks; {fix}")
    if len(value) > longest:
        raise UserError(
            f"{key} ({value[:40]}…) has {len(value)} characters, and W&B takes {longest}; {fix}, no longer than that"
        )
    if any(unicodedata.category(each) in LINE_ENDS_AND_CONTROLS for each in value):
        raise UserError(f"{key} ({value!r}) must be one line without control characters; {fix}")


def _listed() -> str:
    return " ".join(NOT_IN_PATHS)
