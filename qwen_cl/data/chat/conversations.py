"""Conversations parsed from rows of instruction data in all common formats. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.columns import Columns, read_columns
from qwen_cl.data.chat.messages import ASSISTANT, DEVELOPER, SYSTEM, USER, Message, check_text, is_empty, parse_turns
from qwen_cl.data.jsonl import kind_of

__all__ = ["ASSISTANT", "SYSTEM", "USER", "Conversation", "Message", "check_text", "pair", "parse_conversation"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation. Only the first message may be a system message; training rows end with an answer."""

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    """Tools in the format of ``apply_chat_template``."""
    documents: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] | None = None
    """Further arguments of the chat template, like enable_thinking."""
    where: str = field(default="", compare=False, repr=False)
    """FILE:LINE."""
    unused: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Names of the row's fields that are not part of the conversation."""


def pair(prompt: str, completion: str) -> Conversation:
    return Conversation((Message(USER, prompt), Message(ASSISTANT, completion)))


def parse_conversation(row: dict[str, Any], fields: tuple[str, str], where: str) -> Conversation:
    """Read a training row by its keys: prompt and completion (``fields``), OpenAI's ``messages``, ShareGPT's
    ``conversations``, Alpaca's ``instruction``, ``input`` and ``output``, each with the columns of columns.py.

    Raises:
        UserError: names the row and what is wrong with it.
    """
    form = _form(row, fields, where)
    _refuse_second_form(row, fields, form, where)
    if form == fields[0]:
        return _pair(row, fields, where)
    if form == INSTRUCTION:
        return _alpaca(row, where)
    return _turns(row, form, where)


def parse_prompt(row: dict[str, Any], where: str) -> Conversation:
    """Read a row that asks: ``prompt``, or the forms of :func:`parse_conversation` without the last answer.

    Raises:
        UserError: names the row and what is wrong with it.
    """
    form = next((name for name in ("prompt", *FORMS) if not is_empty(row.get(name))), None)
    if form is None:
        form = next((name for name in ("prompt", *FORMS) if name in row), None)
    if form is None:
        raise UserError(f"{where}: field 'prompt' or 'messages' is missing (found: {_names(row)})")
    if form in TURNS or isinstance(row[form], list):
        turns, used = parse_turns(row[form], form, where), {form}
    else:
        text, used = check_text(row[form], f"field {form!r}", where), {form}
        if form == INSTRUCTION:
            text, used = text + _input(row, where), {form, "input"}
        turns = (Message(USER, text),)
    columns = read_columns(row, used, where)
    messages = _with_columns(turns, columns, form, where)
    if messages[-1].role == ASSISTANT:
        raise UserError(f"{where}: {form} ends with an answer, which leaves nothing to answer; cut it")
    return _conversation(messages, columns, where)


INSTRUCTION = "instruction"
TURNS = ("messages", "conversations")
FORMS = (*TURNS, INSTRUCTION)
"""Fields that identify a format, beside prompt and completion."""


def _form(row: dict[str, Any], fields: tuple[str, str], where: str) -> str:
    if all(name in row for name in fields):
        return fields[0]
    form = next((name for name in FORMS if name in row), None)
    if form is not None:
        return form
    read_columns(row, set(row.keys() & set(fields)), where)  # its error is more specific
    if (known := next((name for name in fields if name in row), None)) is not None:
        missing = next(name for name in fields if name != known)
        raise UserError(
            f"{where}: field {missing!r} is missing (found: {_names(row)}); rename it, or set data.fields.{missing}"
        )
    raise UserError(
        f"{where}: no instruction form has these fields (found: {_names(row)}); write {fields[0]} and {fields[1]}, "
        "messages, conversations, or instruction and output; data.fields maps other field names "
        "(the first line of a CSV or TSV file must)"
    )


def _refuse_second_form(row: dict[str, Any], fields: tuple[str, str], form: str, where: str) -> None:
    complete = [name for name in TURNS if isinstance(row.get(name), list) and row[name]]
    complete += [fields[0]] if not any(is_empty(row.get(name)) for name in fields) else []
    complete += [INSTRUCTION] if not any(is_empty(row.get(name)) for name in (INSTRUCTION, "output")) else []
    if other := next((name for name in complete if name != form), None):
        raise UserError(f"{where}: the row has two conversations, in {form!r} and in {other!r}; keep one of them")


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _pair(row: dict[str, Any], fields: tuple[str, str], where: str) -> Conversation:
    """Parse a prompt and a completion: texts, or lists of messages as in TRL, where the prompt is not trained on."""
    if not any(isinstance(row[name], list) for name in fields):
        prompt, completion = (check_text(row[name], f"field {name!r}", where) for name in fields)
        turns: tuple[Message, ...] = (Message(USER, prompt), Message(ASSISTANT, completion))
        if len(row) == 2:
            return Conversation(turns, where=where)
    else:
        prompt_turns, answer_turns = (
            _either(row[name], name, role, where) for name, role in zip(fields, (USER, ASSISTANT))
        )
        turns = (*(Message(turn.role, turn.content, turn.more, False) for turn in prompt_turns), *answer_turns)
    return _answered(turns, row, set(fields), fields[1], where)


def _either(value: Any, name: str, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, list):
        return parse_turns(value, name, where, first=role == USER)
    return (Message(role, check_text(value, f"field {name!r}", where)),)


def _alpaca(row: dict[str, Any], where: str) -> Conversation:
    """Parse Alpaca's fields (github.com/tatsu-lab/stanford_alpaca); the input follows the instruction, as there."""
    if "output" not in row:
        raise UserError(f"{where}: field 'output' is missing (found: {_names(row)}); it answers 'instruction'")
    instruction = check_text(row[INSTRUCTION], f"field {INSTRUCTION!r}", where) + _input(row, where)
    output = check_text(row["output"], "field 'output'", where)
    turns = (Message(USER, instruction), Message(ASSISTANT, output))
    return _answered(turns, row, {INSTRUCTION, "input", "output"}, "output", where)


def _input(row: dict[str, Any], where: str) -> str:
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise UserError(f"{where}: field 'input' is {kind_of(given)}, it must be a string")
    return "\n\n" + check_text(given, "field 'input'", where) if given and given.strip() else ""


def _turns(row: dict[str, Any], form: str, where: str) -> Conversation:
    return _answered(parse_turns(row[form], form, where), row, {form}, form, where)


def _answered(
    turns: tuple[Message, ...], row: dict[str, Any], used: set[str], ends_with: str, where: str
) -> Conversation:
    if turns[-1].role != ASSISTANT:
        raise UserError(
            f"{where}: {ends_with} ends with a message of the {turns[-1].role}, which nothing answers; cut it"
        )
    if len(row) == len(used & row.keys()):
        return Conversation(turns, where=where)
    columns = read_columns(row, used, where)
    return _conversation(_with_columns(turns, columns, ends_with, where), columns, where)


def _with_columns(turns: tuple[Message, ...], columns: Columns, form: str, where: str) -> tuple[Message, ...]:
    """Prepend the system message and earlier turns of the columns, and add their reasoning to the answer."""
    if columns.history:
        if form in TURNS:
            raise UserError(
                f"{where}: the row has field 'history' beside {form!r}, which has the earlier turns; keep one"
            )
        turns = (*columns.history, *turns)
    if columns.system is not None:
        if turns[0].role in (SYSTEM, DEVELOPER):
            if turns[0].content != columns.system:
                raise UserError(
                    f"{where}: field {columns.system_name!r} and the first message are two system messages that "
                    "differ; keep one"
                )
        else:
            turns = (Message(SYSTEM, columns.system), *turns)
    if columns.reasoning and turns[-1].role == ASSISTANT:
        last = turns[-1]
        if last.more and "reasoning_content" in last.more:
            raise UserError(f"{where}: the last answer and the row both have reasoning; keep one")
        turns = (*turns[:-1], Message(last.role, last.content, {**(last.more or {}), **columns.reasoning}, True))
    return turns


def _conversation(messages: tuple[Message, ...], columns: Columns, where: str) -> Conversation:
    return Conversation(
        messages, columns.tools, columns.documents, columns.template_arguments, where=where, unused=columns.unused
    )
