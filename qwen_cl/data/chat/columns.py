"""Columns of a row beside its conversation: read, refused by name, or listed as unused. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.messages import (
    ASSISTANT,
    MEDIA,
    REASONING,
    USER,
    Message,
    check_text,
    is_empty,
    parse_json,
    parse_reasoning,
)
from qwen_cl.data.jsonl import kind_of

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
TOOL_COLUMNS = ("tools", "functions")
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
THINKING = "enable_thinking"
PREFERENCES = ("chosen", "rejected", "chosen_response", "rejected_response", "kto_tag")
FULL_WEIGHT = (1, "1", "1.0", "true", "True")
"""Values that mean weight 1, also as cells of tables."""
ROW_WEIGHTS = ("weight", "weights", "sample_weight", "loss_weight", "train", "training", "mask", "loss_mask")
TOKENS = ("input_ids", "assistant_masks", "completion_mask")
MEANING_COLUMNS = (
    *(*SYSTEM_COLUMNS, *TOOL_COLUMNS, *REASONING, *MEDIA, *PREFERENCES, *ROW_WEIGHTS, *TOKENS),
    *("history", "documents", "label", "chat_template", TEMPLATE_ARGUMENTS, THINKING),
)
"""Columns that are read, or refused because they would change the training data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The values of the recognized columns, and the names of the others."""

    system: str | None
    system_name: str
    history: tuple[Message, ...]
    tools: list[dict[str, Any]] | None
    documents: list[dict[str, Any]] | None
    template_arguments: dict[str, Any] | None
    reasoning: dict[str, str]
    unused: tuple[str, ...]


def read_columns(row: dict[str, Any], used: set[str], where: str) -> Columns:
    """Read the columns beside those of the conversation itself (``used``). Null and empty values are ignored.

    Raises:
        UserError: a column is not supported, or its value does not fit its name.
    """
    rest = {name: value for name, value in row.items() if name not in used and not is_empty(value)}
    _refuse(rest, used, where)
    system_name, system = _system(rest, where)
    return Columns(
        system=system,
        system_name=system_name,
        history=_history(rest.get("history"), where),
        tools=_tools(rest, where),
        documents=_objects(rest.get("documents"), "documents", where),
        template_arguments=_arguments(rest, where),
        reasoning=parse_reasoning(rest, "", where),
        unused=tuple(name for name in rest if name not in MEANING_COLUMNS),
    )


def _refuse(rest: dict[str, Any], used: set[str], where: str) -> None:
    for name in MEDIA:
        if name in rest:
            raise UserError(f"{where}: field {name!r}: images, audio and video are not supported; remove the row")
    for name in PREFERENCES:
        if name in rest:
            raise UserError(
                f"{where}: field {name!r} is preference data (DPO, KTO), which is not supported; write the answer to "
                "train on as a completion"
            )
    if isinstance(rest.get("label"), bool):
        raise UserError(
            f"{where}: field 'label' says whether the answer is a good one (KTO), which is not supported; keep the "
            "good ones and remove the field"
        )
    for name in ROW_WEIGHTS:
        if name in rest and rest[name] not in FULL_WEIGHT:
            raise UserError(
                f"{where}: field {name!r} weights a whole row, which is not supported; remove the row or the field, or "
                "write weight: 0 on the answers that are context only"
            )
    for name in TOKENS:
        if name in rest:
            raise UserError(
                f"{where}: field {name!r} belongs to pretokenized rows, which are not supported; give the texts"
            )
    if "chat_template" in rest:
        raise UserError(f"{where}: field 'chat_template' is not read; data.chat_template sets one for all rows")


def _system(rest: dict[str, Any], where: str) -> tuple[str, str | None]:
    given = {
        name: check_text(rest[name], f"field {name!r}", where) for name in SYSTEM_COLUMNS if _has_value(rest, name)
    }
    if len(set(given.values())) > 1:
        raise UserError(f"{where}: the row has {' and '.join(given)}, which differ; keep one")
    return next(iter(given.items()), ("", None))


def _has_value(rest: dict[str, Any], name: str) -> bool:
    return name in rest and not (isinstance(rest[name], str) and not rest[name].strip())


def _history(value: Any, where: str) -> tuple[Message, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = parse_json(value, "field 'history'", where)
    if not isinstance(value, list):
        raise UserError(f"{where}: field 'history' is {kind_of(value)}, it must be a list of [prompt, answer] pairs")
    messages: list[Message] = []
    for number, turn in enumerate(value):
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{where}: history[{number}] must be a pair [prompt, answer]")
        prompt, answer = (check_text(text, f"history[{number}][{index}]", where) for index, text in enumerate(turn))
        messages += [Message(USER, prompt), Message(ASSISTANT, answer)]
    return tuple(messages)


def _tools(rest: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    given = [name for name in TOOL_COLUMNS if name in rest]
    if len(given) > 1:
        raise UserError(f"{where}: the row has tools and functions; keep one")
    if not given or not _has_value(rest, given[0]):
        return None
    tools = _objects(rest[given[0]], given[0], where)
    if given == ["functions"] and tools:  # OpenAI's older name
        return [{"type": "function", "function": function} for function in tools]
    return tools or None


def _objects(value: Any, name: str, where: str) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = parse_json(value, f"field {name!r}", where)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError(f"{where}: field {name!r} must be a list of objects, or that as JSON in a string")
    return value or None


def _arguments(rest: dict[str, Any], where: str) -> dict[str, Any] | None:
    value = rest.get(TEMPLATE_ARGUMENTS, {})
    if isinstance(value, str):
        value = parse_json(value, f"field {TEMPLATE_ARGUMENTS!r}", where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: field {TEMPLATE_ARGUMENTS!r} is {kind_of(value)}, it must be an object")
    found = {name: each for name, each in value.items() if each is not None}
    if THINKING in rest:
        found.setdefault(THINKING, rest[THINKING])
        if found[THINKING] != rest[THINKING]:
            raise UserError(f"{where}: field {THINKING!r} and {TEMPLATE_ARGUMENTS}.{THINKING} disagree; keep one")
    return found or None
