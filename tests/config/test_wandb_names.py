"""Names that W&B would refuse once a run has started are refused before."""

from __future__ import annotations

import pytest

from qwen_cl.config.errors import UserError
from tests.support.exporting import composed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("wandb.project=team/proj", "wandb.project (team/proj) must hold none of / \\ # ? % :; write the user or team "
         "by itself: wandb.entity=team wandb.project=proj"),
        ("wandb.project='a#b'", "wandb.project (a#b) must hold none of / \\ # ? % :; choose another name"),
        ("wandb.project='a\\b'", "wandb.project (a\\b) must hold none of"),
        ("wandb.project='a:b'", "wandb.project (a:b) must hold none of"),
        ("wandb.project=/b", "wandb.project (/b) must hold none of"),
        ("wandb.project=''", "wandb.project ('') must not be empty; choose another name"),
        ("wandb.project='  '", "wandb.project ('  ') must not be empty"),
        ("wandb.project=' a'", "wandb.project (' a') must not begin or end with blanks"),
        (f"wandb.project={'p' * 129}", f"wandb.project ({'p' * 40}…) has 129 characters, and W&B takes 128; choose"),
        (f"name='{'日' * 129}'", f"name ({'日' * 40}…) has 129 characters, and W&B takes 128; write another, or null"),
        ("name=''", "name ('') must not be empty; write another, or null for the task and the peft method"),
        ("name='a\nb'", "name ('a\\nb') must be one line without control characters"),
        ("wandb.entity=a/b", "wandb.entity (a/b) must hold none of / \\ # ? % :; write the name of a user or team"),
        ("wandb.entity=''", "wandb.entity ('') must not be empty"),
        ("wandb.tags=['a\tb']", "wandb.tags ('a\\tb') must be one line without control characters"),
    ],
)  # fmt: skip
def test_what_wandb_does_not_take(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        composed(override)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "override",
    [
        f"wandb.project={'p' * 128}",
        f"name='{'日' * 128}'",
        "name='a/b: 日本 👩‍💻 100%'",
        "name=null",
        "wandb.entity=null",
        "wandb.project='日本 (1)'",
    ],
)
def test_what_wandb_takes(override: str) -> None:
    composed(override)


def test_wandb_agrees_about_projects() -> None:
    from wandb import Settings
    from wandb.errors import UsageError

    from qwen_cl.config.wandb_names import check_project

    for character in map(chr, range(33, 127)):
        refused = []
        for check in (lambda project: Settings(project=project), check_project):
            try:
                check(f"a{character}b")
            except (UserError, UsageError, ValueError):
                refused.append(check)
        assert len(refused) in (0, 2), character
