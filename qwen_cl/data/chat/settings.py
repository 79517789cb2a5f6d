"""What a run's config says of how conversations are rendered. No torch."""

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
"""Where transformers looks for a template first."""
BUILT_IN = Path(__file__).parent / "templates"
CLOCK = "strftime_now"
"""What templates ask for the day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """The defaults leave everything to the tokenizer's own template."""

    system_prompt: str | None = None
    """Of conversations without a system message."""
    special_tokens_in_content: bool = False
    """A special token's name in a message is that token; else it is text."""
    template_date: str | None = None
    """ISO date that templates are told is today's; None for today's own."""
    chat_template: str | None = None
    """The text of a template in place of the tokenizer's."""

    def non_defaults(self) -> dict[str, Any]:
        """Those that differ from the defaults: a part of what the data's hash is of."""
        default = asdict(ChatSettings())
        return {name: value for name, value in asdict(self).items() if value != default[name]}


def chat_settings(data: DataConfig, *, from_run: bool = False) -> ChatSettings:
    """``from_run``: its tokenizer has the template already, and the file it came from may be gone.

    Raises:
        UserError: there is no such template, or it is none.
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
    """The date that the template renders: the config's, ``run_date``, or today's; None where it asks for none.

    Raises:
        UserError: the config names one, and the template does not ask.
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
    """The date in the first of these config files of runs that has one: a run that resumes, and the later trials of a
    sweep, go on with the day that they began with."""
    for path in configs:
        data = read_run_config(path).data if path.is_file() else None
        if isinstance(data, ChatDataConfig) and data.template_date is not None:
            return data.template_date
    return None


def chat_facts(data: DataConfig) -> list[tuple[str, str]]:
    """Name and text of what a run's summary says of how conversations are rendered; nothing of the defaults."""
    if not isinstance(data, ChatDataConfig):
        return []
    facts = []
    if data.chat_template is not None:
        facts.append(("chat template", f"{data.chat_template}, in place of the model's own if it has one"))
    if data.template_date is not None:
        facts.append(("template's date", f"{data.template_date}, kept when the run resumes and for all who ask it"))
    if data.system_prompt is not None:
        facts.append(("system prompt", f"{data.system_prompt[:60]!r} for conversations without one"))
    if data.special_tokens_in_content:
        facts.append(("special tokens", "what reads like one in a message is one (data.special_tokens_in_content)"))
    return facts


def write_template(data: DataConfig, directory: Path) -> None:
    """The template in place of the model's own, if the config names one, among the files of a tokenizer."""
    text = chat_settings(data).chat_template
    if text is not None:
        (directory / TEMPLATE_FILE).write_text(text, encoding="utf-8")


def write_run_template(data: DataConfig, tokenizer: Path, directory: Path) -> None:
    """Beside an adapter, whose base has another template or none: the one that the run's tokenizer files hold."""
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
