"""Chat templates, rendered as by transformers. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.conversations import Conversation
from qwen_cl.data.chat.messages import Message
from qwen_cl.data.chat.template_errors import describe_template_error
from qwen_cl.data.chat.template_values import as_object, as_text, probe_call, strings_in, with_arguments, with_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_cl.data.chat.content_tokens import ContentTokens, Marks

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Pattern of the block that marks generated text, as in transformers."""
RESERVED = (
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens", "strftime_now"),
)
"""Arguments of ``apply_chat_template`` that no row may set."""
PROBE = {"a": "b"}
PROBE_TEXT = '{"a": "b"}'
PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {}}}
PROBE_QUESTION = {"role": "user", "content": "q"}


Span = tuple[int, int]
"""A half-open range of characters."""


class TemplateError(Exception):
    """The error message of a template, on one line."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation prepared for the template."""

    template: ChatTemplate
    where: str
    messages: tuple[Message, ...]
    """Messages, with the system message of the settings, if any."""
    plain: list[dict[str, Any]]
    """Messages in the format of ``apply_chat_template``."""
    tools: list[dict[str, Any]] | None
    documents: list[dict[str, Any]] | None
    arguments: dict[str, Any]

    def render(self, messages: list[dict[str, Any]] | None = None, *, prompt: bool = False) -> str:
        """Render the messages. Raises UserError with FILE:LINE and the template's error."""
        try:
            return self.try_render(messages, prompt=prompt)
        except TemplateError as error:
            raise UserError(
                f"{self.where or 'the prompt'}: the chat template refuses this conversation: {error}; change the row, "
                "or give another template with data.chat_template"
            ) from error

    def try_render(self, messages: list[dict[str, Any]] | None = None, *, prompt: bool = False) -> str:
        """Render the messages. Raises TemplateError."""
        return self.template.render(self.plain if messages is None else messages, self, prompt=prompt)

    def render_whole(self) -> tuple[str, list[Span] | None]:
        """Render the conversation with the spans of its ``{% generation %}`` blocks, or None. Raises UserError."""
        if not self.template.marks_generation:
            return self.render(), None
        self.render()  # for its errors
        return self.template.render_generation(self)

    def content(self) -> Iterator[str]:
        """Yield every string of the row that is rendered."""
        for message in self.plain:
            if len(message) == 2:
                yield message["content"]
            else:
                yield from strings_in({key: value for key, value in message.items() if key != "role"})
        for more in (self.tools, self.documents, self.arguments):
            if more:
                yield from strings_in(more)

    def with_marks(self, tokens: ContentTokens, marks: Marks) -> Rendering:
        """Return a copy with names of special tokens in the content marked."""

        def mark(text: str) -> str:
            return tokens.mark(text, marks)

        return replace(
            self,
            plain=[{**with_strings(each, mark), "role": each["role"]} for each in self.plain],
            tools=with_strings(self.tools, mark),
            documents=with_strings(self.documents, mark),
            arguments=with_strings(self.arguments, mark),
        )


class ChatTemplate:
    """The chat template of a tokenizer, with a fixed date."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: date | None) -> None:
        self._tokenizer = tokenizer
        self._day = day

    def prepare(self, row: Conversation, messages: tuple[Message, ...]) -> Rendering:
        """Prepare a row for the template. Raises UserError if it sets an argument that the template does not use."""
        arguments = row.template_arguments or {}
        for name in arguments:
            if name in RESERVED:
                raise UserError(f"{row.where}: chat_template_kwargs.{name} is not for rows to set; remove it")
            if name not in self.variables:
                raise UserError(
                    f"{row.where}: {name}, an argument of the chat template, is not used by this model's; remove "
                    "it, or give another template with data.chat_template"
                )
        plain = [self._plain(message) for message in messages]
        return Rendering(self, row.where, messages, plain, row.tools, row.documents, arguments)

    def render(self, messages: list[dict[str, Any]], of: Rendering, *, prompt: bool) -> str:
        """Render messages with the tools, documents and arguments of a rendering. Raises TemplateError."""
        try:
            self._fix_date(of.tools)
            return self._tokenizer.apply_chat_template(
                messages,
                tools=of.tools,
                documents=of.documents,
                tokenize=False,
                add_generation_prompt=prompt,
                **of.arguments,
            )
        except Exception as error:  # a template is code: it may raise anything
            raise TemplateError(describe_template_error(error)) from error

    def render_generation(self, of: Rendering) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        self._fix_date(of.tools)
        (text,), (spans,) = render_jinja_template(
            conversations=[[{key: value for key, value in each.items() if value is not None} for each in of.plain]],
            tools=of.tools,
            documents=of.documents,
            chat_template=self.source(of.tools),
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **of.arguments},
        )
        return text, [(start, stop) for start, stop in spans if start < stop]

    def _fix_date(self, tools: list[dict[str, Any]] | None) -> None:
        """Set the date in the compiled template, which transformers caches; as an argument, transformers 5 would
        convert the function to text."""
        if self._day is not None:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(self.source(tools)).globals["strftime_now"] = self._day.strftime

    def source(self, tools: list[dict[str, Any]] | None = None) -> str:
        """Return the text of the template; some models have a separate one for tools."""
        return str(self._tokenizer.get_chat_template(None, tools))

    def split(self, text: str) -> list[str]:
        """Split a text at the names of added tokens, which become separate pieces."""
        return [piece for piece in self._names.split(text) if piece]

    @cached_property
    def _names(self) -> re.Pattern[str]:
        names = sorted(
            {token.content for token in self._tokenizer.added_tokens_decoder.values()}, key=len, reverse=True
        )
        return re.compile("(" + "|".join(map(re.escape, filter(None, names))) + ")") if names else re.compile("(?!)")

    @property
    def marks_generation(self) -> bool:
        return "generation" in self._all_sources and GENERATION.search(self._all_sources) is not None

    @cached_property
    def variables(self) -> set[str]:
        """The variables that the template reads and does not define."""
        import jinja2
        import jinja2.meta

        found: set[str] = set()
        for text in self._sources:
            # transformers' own blocks and loop controls are unknown to a plain environment.
            environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
            found |= jinja2.meta.find_undeclared_variables(environment.parse(_without_generation(text)))
        return found

    @cached_property
    def _sources(self) -> list[str]:
        template = self._tokenizer.chat_template
        return list(template.values()) if isinstance(template, dict) else [template or ""]

    @cached_property
    def _all_sources(self) -> str:
        return "\n".join(self._sources)

    def _plain(self, message: Message) -> dict[str, Any]:
        if message.more is None:
            return {"role": message.role, "content": message.content}
        found = {"role": message.role, "content": message.content, **message.more}
        no_parts = isinstance(found["content"], list) and not self._takes_parts
        no_null = found["content"] is None and not ("tool_calls" in found and self._takes_null)
        if no_parts or no_null:
            found["content"] = message.content
        if "tool_calls" in found and (wanted := self._arguments_form) is not None:
            found["tool_calls"] = [with_arguments(call, wanted) for call in found["tool_calls"]]
        return found

    @cached_property
    def _takes_parts(self) -> bool:
        """True if a list of text parts is rendered like their text."""
        text: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
        parts: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        empty = Rendering(self, "", (), [], None, None, {})
        try:
            return empty.try_render(text) == empty.try_render(parts)
        except TemplateError:
            return False

    @cached_property
    def _takes_null(self) -> bool:
        """True if an answer may be tool calls without text; other templates fail on null content."""
        answer: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [probe_call(PROBE)]}
        try:
            Rendering(self, "", (), [], [PROBE_TOOL], None, {}).try_render([PROBE_QUESTION, answer])
        except TemplateError:
            return False
        return True

    @cached_property
    def _arguments_form(self) -> Callable[[Any], Any] | None:
        """The conversion of tool call arguments for this template; None if it accepts both objects and JSON text."""
        rendered = []
        for arguments in (PROBE, PROBE_TEXT):
            answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [probe_call(arguments)]}
            try:
                rendered.append(
                    Rendering(self, "", (), [], [PROBE_TOOL], None, {}).try_render([PROBE_QUESTION, answer])
                )
            except TemplateError:
                rendered.append("")
        of_object, of_text = rendered
        if of_object == of_text:
            return None
        python = str(PROBE) in of_object and PROBE_TEXT in of_text  # the object is rendered as a Python dict
        return as_text if not of_object or python else as_object


def _without_generation(text: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
