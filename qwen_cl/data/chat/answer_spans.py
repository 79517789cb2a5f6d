"""Character ranges of the assistant messages in a rendered conversation. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.template import Rendering, Span, TemplateError

PLACEHOLDER = "\ue0f1\ue0f0\ue0f1"
"""Private-use characters that replace an answer to find the text around it."""


def locate_answers(rendering: Rendering, rendered: str, wanted: list[int]) -> list[Span]:
    """Return the span of each wanted message in the rendered text: from the generation prompt to the end of its turn.

    A turn begins where the prompt before it ends (``add_generation_prompt``), and ends where the rendered conversation
    up to it ends, without trailing newlines. This costs two renderings per answer. Some templates, like Qwen3's,
    render an answer differently once others follow: there the answer is replaced by a placeholder, and the unchanged
    text before and after it gives its span.

    Raises:
        UserError: the span of an answer cannot be determined.
    """
    return [_locate(rendering, rendered, number) for number in wanted]


def _locate(rendering: Rendering, rendered: str, number: int) -> Span:
    is_last = number + 1 == len(rendering.plain)
    prompt = _try(rendering, rendering.plain[:number], prompt=True)
    start = len(prompt) if prompt is not None and rendered.startswith(prompt) else None
    stop = len(rendered.rstrip("\n")) if is_last else None
    if stop is None and start is not None:
        until = _try(rendering, rendering.plain[: number + 1])
        if until is not None and rendered.startswith(until := until.rstrip("\n")):
            stop = len(until)
    if start is None or stop is None:
        found = (
            _by_replacing(rendering, rendered, number, replaced, prompt) for replaced in _replaced(rendering, number)
        )
        replaced_start, replaced_stop = next(filter(None, found), (-1, -1))
        start = replaced_start if start is None else start
        stop = replaced_stop if stop is None else stop
    if not 0 <= start < stop:
        raise _not_found(rendering, number)
    return start, stop


def _replaced(rendering: Rendering, number: int) -> Iterator[dict[str, Any]]:
    """Yield the answer with the placeholder as its text, then as the name of its first tool call."""
    message = rendering.plain[number]
    yield {**message, "content": PLACEHOLDER}
    if calls := message.get("tool_calls"):
        call = (
            {**calls[0], "function": {**calls[0]["function"], "name": PLACEHOLDER}} if "function" in calls[0] else None
        )
        yield {**message, "tool_calls": [call or {**calls[0], "name": PLACEHOLDER}, *calls[1:]]}


def _by_replacing(
    rendering: Rendering, rendered: str, number: int, replaced: dict[str, Any], prompt: str | None
) -> Span | None:
    before, after = _around(_try(rendering, [*rendering.plain[:number], replaced, *rendering.plain[number + 1 :]]))
    if before is None or after is None or not (rendered.startswith(before) and rendered.endswith(after)):
        return None
    alone_before, alone_after = _around(_try(rendering, [*rendering.plain[:number], replaced]))
    # Text that the template puts between the prompt and the placeholder is part of the answer.
    opening = alone_before[len(prompt) :] if prompt and alone_before and alone_before.startswith(prompt) else ""
    if replaced["content"] != PLACEHOLDER and not before.endswith(opening or PLACEHOLDER):
        return None
    start = len(before) - (len(opening) if before.endswith(opening) else 0)
    closing = _turn_end(rendering, after, alone_after)
    return None if closing is None else (start, len(rendered) - len(after) + len(closing))


def _turn_end(rendering: Rendering, after: str, alone: str | None) -> str | None:
    """Return the text that ends a turn, without trailing newlines. ``alone`` is the text after a final answer, which in
    some templates, like Phi's, includes an end of text that other turns lack."""
    if alone is None:
        return None
    closing = ""
    for piece in rendering.template.split(alone):
        if not after.startswith(closing + piece.rstrip("\n")):
            break
        closing += piece
    stripped = closing.rstrip("\n")
    return stripped if (stripped or not alone.strip("\n")) and after.startswith(stripped) else None


def _around(text: str | None) -> tuple[str | None, str | None]:
    if text is None or text.count(PLACEHOLDER) != 1:
        return None, None
    before, _, after = text.partition(PLACEHOLDER)
    return before, after


def _try(rendering: Rendering, messages: list[dict[str, Any]], *, prompt: bool = False) -> str | None:
    if not messages:
        return None
    try:
        return rendering.try_render(messages, prompt=prompt)
    except TemplateError:
        return None


def _not_found(rendering: Rendering, number: int) -> UserError:
    return UserError(
        f"{rendering.where}: the chat template renders message {number + 1} (assistant) so that its text cannot be "
        "told from the text around it; write task.loss_on=last_assistant if that is so of earlier answers only, or "
        "give a template with {% generation %} blocks with data.chat_template"
    )
