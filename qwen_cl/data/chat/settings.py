"""Settings of a run for rendering conversations. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.data import ChatDataConfig, DataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.saved import read_run_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"
"""File name that transformers reads a chat template from first."""
BUILT_IN = Path(__file__).parent / "templates"
CLOCK = "strftime_now"
"""Function by which templates render the current date."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """The settings for rendering conversations; the defaults use the tokenizer's own template unchanged."""

    system_prompt: str | None = None
    """System message of conversations without one."""
    special_tokens_in_content: bool = False
    """Encode the name of a special token in a message as that token, not as text."""
    template_date: str | None = None
    """ISO date that templates render as today; None for the current date."""
    chat_template: str | None = None
    """Template text that replaces the tokenizer's."""

    def non_defaults(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, which are part of the data hash."""
        default = asdict(ChatSettings())
        return {name: value for name, value in asdict(self).items() if value != default[name]}


def chat_settings(data: DataConfig, *, from_run: bool = False) -> ChatSettings:
    """Return the chat settings of a config. ``from_run`` skips the template, which the run's tokenizer already has.

    Raises:
        UserError: the template does not exist or is invalid.
    """
    if not isinstance(data, ChatDataConfig):
        return ChatSettings()
    read = data.chat_template is not None and not from_run
    return ChatSettings(
        system_prompt=data.system_prompt,
        special_tokens_in_content=data.special_tokens_in_content,
        template_date=data.template_date,
        chat_template=_template_text(str(data.chat_template)) if read else None,
    )


def resolve_template_date(data: DataConfig, tokenizer: PreTrainedTokenizerBase, run_date: str | None) -> str | None:
    """Return the date that the template renders: the config's, ``run_date``, or today; None if it renders none.

    Raises:
        UserError: the config sets a date that the template does not render.
    """
    if not isinstance(data, ChatDataConfig):
        return None
    template = chat_settings(data).chat_template or tokenizer.chat_template or ""
    texts = template.values() if isinstance(template, dict) else [template]
    if any(CLOCK in text for text in texts):
        return data.template_date or run_date or today()
    if data.template_date is not None and template:
        raise UserError(
            f"data.template_date ({data.template_date}) has no effect: the chat template does not render today's "
            "date; remove it"
        )
    return data.template_date


def with_template_date(data: DataConfig, day: str | None) -> DataConfig:
    return replace(data, template_date=day) if isinstance(data, ChatDataConfig) and day is not None else data


def today() -> str:
    return datetime.now().date().isoformat()


def previous_template_date(configs: Iterable[Path]) -> str | None:
    """Return the date in the first of these run configs that has one, so that a resumed run and the later trials of a
    sweep keep the date of the start."""
    for path in configs:
        data = read_run_config(path).data if path.is_file() else None
        if isinstance(data, ChatDataConfig) and data.template_date is not None:
            return data.template_date
    return None


def chat_facts(data: DataConfig) -> list[tuple[str, str]]:
    """Return the name and text of each non-default chat setting, for the summary of a run."""
    if not isinstance(data, ChatDataConfig):
        return []
    facts = []
    if data.chat_template is not None:
        facts.append(("chat template", f"{data.chat_template}, in place of the model's own if it has one"))
    if data.template_date is not None:
        facts.append(("template's date", f"{data.template_date}, kept when the run resumes and at inference"))
    if data.system_prompt is not None:
        facts.append(("system prompt", f"{data.system_prompt[:60]!r} for conversations without one"))
    if data.special_tokens_in_content:
        facts.append(
            ("special tokens", "their names in messages are encoded as the tokens (data.special_tokens_in_content)")
        )
    return facts


def write_template(data: DataConfig, directory: Path) -> None:
    """Write the config's template, if it names one, to a tokenizer directory, where it replaces the model's."""
    text = chat_settings(data).chat_template
    if text is not None:
        (directory / TEMPLATE_FILE).write_text(text, encoding="utf-8")


def write_run_template(data: DataConfig, tokenizer: Path, directory: Path) -> None:
    """Copy the run's template, if the config names one, next to an adapter, whose base model lacks it."""
    if isinstance(data, ChatDataConfig) and data.chat_template is not None:
        shutil.copyfile(tokenizer / TEMPLATE_FILE, directory / TEMPLATE_FILE)


def _template_text(value: str) -> str:
    built_in = {path.stem: path for path in BUILT_IN.glob("*.jinja")}
    path = built_in.get(value) or Path(value).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"data.chat_template ({value}) cannot be read: {reason}; name a file, or a built-in one: "
            f"{', '.join(sorted(built_in))}"
        ) from error
    if not text.strip():
        raise UserError(f"data.chat_template ({value}) is empty; write a template that renders messages")
    _check_syntax(text, value)
    return text if value not in built_in else text.rstrip("\n")


def _check_syntax(text: str, value: str) -> None:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.chat_template ({value}), line {error.lineno}: {error.message}") from error
