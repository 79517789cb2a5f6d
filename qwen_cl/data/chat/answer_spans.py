"""Where the answers are in a rendered conversation, as ranges of characters. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.template import Rendering, Span, TemplateError

PLACEHOLDER = "\ue0f1\ue0f0\ue0f1"
"""Private-use characters, in place of an answer whose surroundings are looked for."""


def locate_answers(rendering: Rendering, whole: str, wanted: list[int]) -> list[Span]:
    """The span of each wanted message in ``whole``: from where the model begins to write to the end of its turn.

    A turn begins where the prompt before it ends (``add_generation_prompt``), and ends where the conversation cut
    after it does, newlines at its end apart. That holds for most templates, and costs two renderings an answer. Some
    render an answer otherwise once others follow it, like Qwen3's, which takes the reasoning out: there the answer is
    replaced, and what stays the same before and after it shows where it is.

    Raises:
        UserError: an answer cannot be told from what is around it.
    """
    return [_locate(rendering, whole, number) for number in wanted]


def _locate(rendering: Rendering, whole: str, number: int) -> Span:
    is_last = number + 1 == len(rendering.plain)
    asked = _try(rendering, rendering.plain[:number], prompt=True)
    start = len(asked) if asked is not None and whole.startswith(asked) else None
    stop = len(whole.rstrip("\n")) if is_last else None
    if stop is None and start is not None:
        until = _try(rendering, rendering.plain[: number + 1])
        if until is not None and whole.startswith(until := until.rstrip("\n")):
            stop = len(until)
    if start is None or stop is None:
        found = (_by_replacing(rendering, whole, number, replaced, asked) for replaced in _replaced(rendering, number))
        replaced_start, replaced_stop = next(filter(None, found), (-1, -1))
        start = replaced_start if start is None else start
        stop = replaced_stop if stop is None else stop
    if not 0 <= start < stop:
        raise _not_found(rendering, number)
    return start, stop


def _replaced(rendering: Rendering, number: int) -> Iterator[dict[str, Any]]:
    """The answer with a stand-in for its text, or for the tool that it calls where its text is not rendered."""
    message = rendering.plain[number]
    yield {**message, "content": PLACEHOLDER}
    if calls := message.get("tool_calls"):
        call = (
            {**calls[0], "function": {**calls[0]["function"], "name": PLACEHOLDER}} if "function" in calls[0] else None
        )
        yield {**message, "tool_calls": [call or {**calls[0], "name": PLACEHOLDER}, *calls[1:]]}


def _by_replacing(
    rendering: Rendering, whole: str, number: int, replaced: dict[str, Any], asked: str | None
) -> Span | None:
    before, after = _around(_try(rendering, [*rendering.plain[:number], replaced, *rendering.plain[number + 1 :]]))
    if before is None or after is None or not (whole.startswith(before) and whole.endswith(after)):
        return None
    alone_before, alone_after = _around(_try(rendering, [*rendering.plain[:number], replaced]))
    # What the template puts between the prompt and the stand-in is the model's to write.
    own = alone_before[len(asked) :] if asked and alone_before and alone_before.startswith(asked) else ""
    if replaced["content"] != PLACEHOLDER and not before.endswith(own or PLACEHOLDER):
        return None
    start = len(before) - (len(own) if before.endswith(own) else 0)
    closing = _turn_end(rendering, after, alone_after)
    return None if closing is None else (start, len(whole) - len(after) + len(closing))


def _turn_end(rendering: Rendering, after: str, alone: str | None) -> str | None:
    """What ends a turn, without newlines at its end. ``alone`` is what follows the answer where nothing else does:
    Phi's template, for one, has an end of text there too, which others do not come before."""
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
        "told from what is around it; write task.loss_on=last_assistant if that is so of earlier answers only, or give "
        "a template with {% generation %} blocks with data.chat_template"
    )
