"""Checks that the chat template renders all content of a row. No torch.

What a template drops depends on the keys and roles of a conversation, and hardly ever on its texts: so each combination
is tested once, by changing one value at a time and comparing the rendered text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.messages import REASONING, RESULTS
from qwen_cl.data.chat.template import Rendering, TemplateError

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDED = "\ue0f2"
"""A private-use character that texts do not contain."""
MEANING = (
    *("content", "tool_calls", "name", "refusal", "tools", "functions", "documents", "tool_plan", "citations"),
    *("prefix", "channel", "recipient", "thought", "thoughts"),
)
"""Keys of a message with content: dropping them would change the meaning of the row."""


class TemplateUse:
    """The keys that a template ignores, for every combination of roles and keys seen so far."""

    def __init__(self) -> None:
        self._unused: dict[Any, tuple[str, ...]] = {}

    def check(self, rendering: Rendering, text: str, *, prompt: bool = False) -> tuple[str, ...]:
        """Return the message keys that the template ignores without loss of content. ``text`` is the rendered
        conversation.

        Raises:
            UserError: the template drops content.
        """
        key = (
            prompt,
            rendering.tools is not None,
            rendering.documents is not None,
            tuple(_shape(message) for message in rendering.plain),
        )
        if key not in self._unused:
            self._unused[key] = _try_all(rendering, text, prompt)
        return self._unused[key]


def _shape(message: dict[str, Any]) -> Any:
    if len(message) == 2:
        return message["role"], bool(message["content"])
    return message["role"], *((name, bool(value)) for name, value in message.items() if name != "role")


def _try_all(rendering: Rendering, text: str, prompt: bool) -> tuple[str, ...]:
    for name in ("tools", "documents"):
        if getattr(rendering, name) is not None and _without(rendering, name, prompt) == text:
            raise _left_out(rendering, name, "")
    unused: dict[str, None] = {}
    for number, message in enumerate(rendering.plain):
        whose = f" of message {number + 1} ({message['role']})"
        for name in _keys(message):
            if _changes(rendering, text, number, name, prompt):
                continue
            if name in MEANING and not (name == "name" and message["role"] in RESULTS):
                raise _left_out(rendering, name, whose)
            if name in REASONING:
                if not _is_rendered_last(rendering, number):
                    raise _left_out(rendering, name, whose)
            else:
                unused[f"messages[].{name}"] = None
    return tuple(unused)


def _keys(message: dict[str, Any]) -> Iterator[str]:
    """Yield the keys with a value; the several names of the reasoning count as one."""
    for name, value in message.items():
        if name != "role" and value and not (name in REASONING[1:] and REASONING[0] in message):
            yield name


def _changes(rendering: Rendering, text: str, number: int, name: str, prompt: bool) -> bool:
    """Return True if the rendered text depends on the key; an error of the template means that it does."""
    message = rendering.plain[number]
    for changed in _changed(message, name):
        messages = [*rendering.plain[:number], changed, *rendering.plain[number + 1 :]]
        try:
            if rendering.try_render(messages, prompt=prompt) == text:
                return False
        except TemplateError:
            pass
    return True


def _changed(message: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    value = message[name]
    if name == "content":
        more = [*value, {"type": "text", "text": ADDED}] if isinstance(value, list) else value + ADDED
        yield {**message, name: more}
    elif name in REASONING:
        yield {key: each for key, each in message.items() if key not in REASONING}
    else:
        yield {key: each for key, each in message.items() if key != name}
    if name == "tool_calls":
        for index, call in enumerate(value):
            for changed in _changed_calls(call):
                yield {**message, name: [*value[:index], changed, *value[index + 1 :]]}


def _changed_calls(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    function = call.get("function", call)
    changed = [{**function, "name": function["name"] + ADDED}]
    if isinstance(function.get("arguments"), dict) and function["arguments"]:
        changed.append({**function, "arguments": {**function["arguments"], ADDED: ADDED}})
    for each in changed:
        yield {**call, "function": each} if "function" in call else each


def _is_rendered_last(rendering: Rendering, number: int) -> bool:
    """Return True if the reasoning is rendered in a last answer: dropping it from earlier ones is intended."""
    messages = rendering.plain[: number + 1]
    bare = {key: each for key, each in messages[-1].items() if key not in REASONING}
    try:
        return rendering.try_render(messages) != rendering.try_render([*messages[:-1], bare])
    except TemplateError:
        return False


def _without(rendering: Rendering, name: str, prompt: bool) -> str | None:
    changes: Any = {name: None}
    try:
        return replace(rendering, **changes).try_render(prompt=prompt)
    except TemplateError:
        return None


def _left_out(rendering: Rendering, name: str, whose: str) -> UserError:
    return UserError(
        f"{rendering.where or 'the prompt'}: {name}{whose} is left out by the model's chat template; remove it, "
        "or give a template that renders it with data.chat_template"
    )
