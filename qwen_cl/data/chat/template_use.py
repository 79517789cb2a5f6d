"""Whether the chat template renders all that a row says. No torch.

What a template leaves out depends on which keys and roles a conversation has, and hardly ever on its texts: so it is
tried once for each combination of them, by changing one thing at a time and comparing what comes out.
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
"""A private-use character that no text has."""
MEANING = (
    *("content", "tool_calls", "name", "refusal", "tools", "functions", "documents", "tool_plan", "citations"),
    *("prefix", "channel", "recipient", "thought", "thoughts"),
)
"""Keys of a message that say something: left out, the row would not mean what it says."""


class TemplateUse:
    """What one template does with every combination of roles and keys seen so far."""

    def __init__(self) -> None:
        self._unused: dict[Any, tuple[str, ...]] = {}

    def check(self, rendering: Rendering, text: str, *, prompt: bool = False) -> tuple[str, ...]:
        """The keys of messages that the template leaves out and that cannot change what is trained on. ``text`` is the
        rendered conversation.

        Raises:
            UserError: it leaves out something else.
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
    """Reasoning goes by several names, and is one thing."""
    for name, value in message.items():
        if name != "role" and value and not (name in REASONING[1:] and REASONING[0] in message):
            yield name


def _changes(rendering: Rendering, text: str, number: int, name: str, prompt: bool) -> bool:
    """Whether the text depends on the key. What the template refuses, it has looked at."""
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
    """Templates that take reasoning out of earlier answers render it in the last: that is the author's wish."""
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
