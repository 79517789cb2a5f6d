"""Messages of conversations in the formats of OpenAI and ShareGPT, parsed and checked. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.jsonl import DECODER, json_fault, kind_of

SYSTEM, DEVELOPER, USER, ASSISTANT, TOOL = "system", "developer", "user", "assistant", "tool"
FUNCTION_CALL = "function_call"
ROLES = {
    **{name: name for name in (SYSTEM, DEVELOPER, USER, ASSISTANT, TOOL, "function", "ipython")},
    "human": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "observation": TOOL,
    "function_response": TOOL,
    FUNCTION_CALL: ASSISTANT,
}
"""Role names in data, and in chat templates. ShareGPT's function_call is an answer of tool calls only."""
RESULTS = (TOOL, "function", "ipython")
"""Roles of tool results, which may be empty."""
WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""Keys that set if an answer is trained on: the names of OpenAI, Axolotl and ms-swift."""
MASKS = ("train_detail", "training_detail", "mask", "masked", "weights", "loss_weight", "loss_scale")
"""Keys for the same purpose that are not supported."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the reasoning; chat templates mostly read the first, transformers 5 accepts all."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
NAMINGS = (("role", "content"), ("from", "value"))
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a conversation."""

    role: str
    content: str
    """Text; empty for a message of tool calls only, or an empty tool result."""
    more: dict[str, Any] | None = None
    """Other keys passed to the chat template."""
    trained: bool = True
    """False for an answer that is context only."""


def is_empty(value: Any) -> bool:
    """Return True for null, an empty string, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def check_text(value: Any, name: str, where: str) -> str:
    """Return the text. Raises UserError if it is not a string, is blank, or has invalid characters."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {kind_of(value)}, it must be a string")
    if not value.strip():
        raise UserError(f"{where}: {name} is empty; remove the row or fill it")
    return check_characters(value, name, where)


def check_characters(value: str, name: str, where: str) -> str:
    if SURROGATE.search(value):
        raise UserError(
            f"{where}: {name} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; "
            "write the character itself, or both halves"
        )
    return value


def parse_json(value: str, name: str, where: str) -> Any:
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {name} should hold JSON: {json_fault(error)}") from error


def parse_turns(turns: Any, key: str, where: str, *, first: bool = True) -> tuple[Message, ...]:
    """Parse a list of messages. If they are the ``first``, a system message may lead them.

    Raises:
        UserError: names the invalid message.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a cell of a table
        turns = parse_json(turns, f"field {key!r}", where)
    if not isinstance(turns, list) or not turns:
        names = NAMINGS[1] if key == "conversations" else NAMINGS[0]
        raise UserError(f"{where}: field {key!r} must be a list of messages with {names[0]} and {names[1]}")
    messages = []
    for number, turn in enumerate(turns):
        message = _message(turn, key, f"{key}[{number}]", where)
        if message.role == SYSTEM and (number or not first):
            raise UserError(f"{where}: {key}[{number}] is a system message, which may only come first")
        messages.append(message)
    return tuple(messages)


def _message(turn: Any, key: str, name: str, where: str) -> Message:
    names = next((names for names in NAMINGS if isinstance(turn, dict) and names[0] in turn), None)
    if names is None or (names[1] not in turn and not (set(turn) & {"tool_calls", FUNCTION_CALL, *REASONING})):
        wanted = NAMINGS[1] if key == "conversations" else NAMINGS[0]
        raise UserError(f"{where}: {name} must be an object with {wanted[0]} and {wanted[1]}")
    given = turn[names[0]]
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise UserError(f"{where}: {name}.{names[0]} ({given}) must be one of {', '.join(ROLES)}")
    if given == FUNCTION_CALL:
        calls = turn.get(names[1])
        turn = {**turn, names[1]: None, "tool_calls": _called(calls, f"{name}.{names[1]}", where)}
    content = turn.get(names[1])
    if len(turn) == 2 and isinstance(content, str):
        empty_is_fine = role in RESULTS
        text = content if empty_is_fine and not content.strip() else check_text(content, f"{name}.{names[1]}", where)
        return Message(role, text)
    more = _more(turn, names, role, name, where)
    text = _content(content, more, role, f"{name}.{names[1]}", where)
    return Message(role, text, more or None, _is_trained(turn, role, name, where))


def _content(content: Any, more: dict[str, Any], role: str, name: str, where: str) -> str:
    """Return the text; ``more`` gets the content for the template where it is not the text."""
    if isinstance(content, list) and content:
        texts = [_part(part, f"{name}[{number}]", where) for number, part in enumerate(content)]
        more["content"] = [{"type": "text", "text": text} for text in texts]
        return check_text("".join(texts), name, where)
    may_be_empty = "tool_calls" in more or any(key in more for key in (*REASONING, "refusal"))
    if content is None and may_be_empty:
        more["content"] = None
        return ""
    if isinstance(content, str) and not content.strip() and (may_be_empty or role in RESULTS):
        return content
    return check_text(content, name, where)


def _part(part: Any, name: str, where: str) -> str:
    if isinstance(part, str):
        return check_characters(part, name, where)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        shown = kind if isinstance(kind, str) and kind != "text" else kind_of(part)
        raise UserError(f'{where}: {name} is {shown}; only parts like {{"type": "text", "text": …}} are supported')
    return check_characters(part["text"], f"{name}.text", where)


def _more(turn: dict[str, Any], names: tuple[str, str], role: str, name: str, where: str) -> dict[str, Any]:
    """Return the other keys with a value, in the form that chat templates take."""
    more = {key: value for key, value in turn.items() if key not in (*names, *WEIGHTS) and not is_empty(value)}
    for key in MASKS:
        if key in more:
            raise UserError(
                f"{where}: {name}.{key} is not supported; to select what is trained on, write weight: 0 on the "
                "answers that are context only"
            )
    for key in MEDIA:
        if key in more:
            raise UserError(f"{where}: {name}.{key}: images, audio and video are not supported; remove the row")
    if FUNCTION_CALL in more:
        call = more.pop(FUNCTION_CALL)
        if "tool_calls" in more:
            raise UserError(f"{where}: {name} has tool_calls and function_call; keep one")
        more["tool_calls"] = _called(call, f"{name}.{FUNCTION_CALL}", where)
    if "tool_calls" in more:
        if role != ASSISTANT:
            raise UserError(f"{where}: {name}.tool_calls is of the {role}; only an assistant calls tools")
        more["tool_calls"] = _tool_calls(more["tool_calls"], f"{name}.tool_calls", where)
    return {**more, **parse_reasoning(more, name, where)}


def parse_reasoning(found: dict[str, Any], name: str, where: str) -> dict[str, str]:
    """Return the reasoning under the names that templates read; empty if there is none."""
    given = {key: found[key] for key in REASONING if not is_empty(found.get(key))}
    for key, value in given.items():
        check_text(value, f"{name}.{key}" if name else f"field {key!r}", where)
    if len(set(given.values())) > 1:
        raise UserError(f"{where}: {name or 'the row'} has {' and '.join(given)}, which differ; keep one")
    if not given:
        return {}
    (text,) = set(given.values())
    return {"thinking": text, **dict.fromkeys(given, text), "reasoning_content": text}


def _is_trained(turn: dict[str, Any], role: str, name: str, where: str) -> bool:
    given = {key: turn[key] for key in WEIGHTS if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{where}: {name}.{key} ({value}) must be 0 (context only) or 1 (trained on)")
        if value and role != ASSISTANT:
            raise UserError(
                f"{where}: {name}.{key} ({value}) is of the {role}, and only answers are trained on; remove it "
                "(task.loss_on=all trains on everything)"
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise UserError(f"{where}: {name} has {' and '.join(given)}, which disagree; keep one")
    return all(given.values())


def _called(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Parse function_call of LLaMA-Factory, or OpenAI's old key of that name."""
    if isinstance(value, str):
        value = parse_json(value, name, where)
    calls = value if isinstance(value, list) else [value]
    return _tool_calls([{"type": "function", "function": call} for call in calls], name, where)


def _tool_calls(calls: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Parse tool calls; arguments may be an object or a JSON string (template.py converts them)."""
    if isinstance(calls, str):
        calls = parse_json(calls, name, where)
    if not isinstance(calls, list) or not calls:
        raise UserError(f"{where}: {name} is {kind_of(calls)}, it must be a list of calls")
    return [_tool_call(call, f"{name}[{number}]", where) for number, call in enumerate(calls)]


def _tool_call(call: Any, name: str, where: str) -> dict[str, Any]:
    """Return the call in OpenAI's format, always with arguments, which templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(f"{where}: {name} must be an object with function: {{name, arguments}}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, f"{name}.function.arguments", where)
    if not is_empty(arguments) and not isinstance(arguments, dict):
        raise UserError(f"{where}: {name}.function.arguments is {kind_of(arguments)}, not an object")
    if is_empty(function.get("arguments")):
        function = {**function, "arguments": {}}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}
