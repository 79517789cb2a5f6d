"""One row of instruction data as a conversation, whichever of the usual forms it has. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_cl.config.errors import UserError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
SHAREGPT_ROLES = {"system": SYSTEM, "human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT}


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """At most one system message, the first; ends with an answer."""

    messages: tuple[Message, ...]


def pair(prompt: str, completion: str) -> Conversation:
    return Conversation((Message(USER, prompt), Message(ASSISTANT, completion)))


def parse_conversation(row: dict[str, Any], fields: tuple[str, str], where: str) -> Conversation:
    """Told apart by their keys, row by row: prompt and completion (``fields``), OpenAI's ``messages``, ShareGPT's
    ``conversations``, Alpaca's ``instruction``, ``input`` and ``output``.

    Raises:
        UserError: names the row and what is wrong with it.
    """
    if all(field in row for field in fields):
        return pair(*(check_text(row[field], f"field {field!r}", where) for field in fields))
    for key, parse in FORMS.items():
        if key in row:
            return parse(row, where)
    if (known := next((field for field in fields if field in row), None)) is not None:
        missing = next(field for field in fields if field != known)
        knob = "data.prompt_field" if missing == fields[0] else "data.completion_field"
        raise UserError(f"{where}: field {missing!r} is missing (found: {_names(row)}); rename it, or set {knob}")
    raise UserError(
        f"{where}: no instruction form has these fields (found: {_names(row)}); write {fields[0]} and {fields[1]}, "
        "messages, conversations, or instruction and output; data.prompt_field and data.completion_field name others"
    )


def check_text(value: Any, name: str, where: str) -> str:
    """Raises UserError where it is no string, blank, or holds what no tokenizer can read."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {type(value).__name__}, it must be a string")
    if not value.strip():
        raise UserError(f"{where}: {name} is empty; remove the row or fill it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(
            f"{where}: {name} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; "
            "write the character itself, or both halves"
        )
    return value


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _alpaca(row: dict[str, Any], where: str) -> Conversation:
    """github.com/tatsu-lab/stanford_alpaca's fields; the input follows the instruction, as in its own prompt."""
    if "output" not in row:
        raise UserError(f"{where}: field 'output' is missing (found: {_names(row)}); it answers 'instruction'")
    instruction = check_text(row["instruction"], "field 'instruction'", where)
    output = check_text(row["output"], "field 'output'", where)
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise UserError(f"{where}: field 'input' is {type(given).__name__}, it must be a string")
    if given and given.strip():
        instruction += "\n\n" + check_text(given, "field 'input'", where)
    return pair(instruction, output)


def parse_messages(row: dict[str, Any], where: str) -> tuple[Message, ...]:
    """OpenAI's form, whoever has the last word."""
    roles = {role: role for role in (SYSTEM, USER, ASSISTANT)}
    return _turns(row["messages"], "messages", ("role", "content"), roles, where)


def _openai(row: dict[str, Any], where: str) -> Conversation:
    return _answered(parse_messages(row, where), "messages", where)


def _sharegpt(row: dict[str, Any], where: str) -> Conversation:
    turns = _turns(row["conversations"], "conversations", ("from", "value"), SHAREGPT_ROLES, where)
    return _answered(turns, "conversations", where)


FORMS: dict[str, Callable[[dict[str, Any], str], Conversation]] = {
    "messages": _openai,
    "conversations": _sharegpt,
    "instruction": _alpaca,
}


def _answered(messages: tuple[Message, ...], key: str, where: str) -> Conversation:
    if messages[-1].role != ASSISTANT:
        raise UserError(f"{where}: {key} ends with a message of the {messages[-1].role}, which nothing answers; cut it")
    return Conversation(messages)


def _turns(turns: Any, key: str, names: tuple[str, str], roles: dict[str, str], where: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: field {key!r} must be a list of messages with {names[0]} and {names[1]}")
    messages = []
    for number, turn in enumerate(turns):
        name = f"{key}[{number}]"
        if not isinstance(turn, dict) or any(field not in turn for field in names):
            raise UserError(f"{where}: {name} must be an object with {names[0]} and {names[1]}")
        role = roles.get(turn[names[0]]) if isinstance(turn[names[0]], str) else None
        if role is None:
            raise UserError(f"{where}: {name}.{names[0]} ({turn[names[0]]}) must be one of {', '.join(roles)}")
        if role == SYSTEM and number:
            raise UserError(f"{where}: {name} is a system message, which may only come first")
        messages.append(Message(role, check_text(turn[names[1]], f"{name}.{names[1]}", where)))
    return tuple(messages)
