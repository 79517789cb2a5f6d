"""Field names of rows: renamed as the config says, or recognized from common datasets. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_cl.config.data import ALPACA, PAIR, TURNS
from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.record import Record
from qwen_cl.data.jsonl import DECODER, json_fault

INSTRUCTION, OUTPUT, INPUT = ALPACA
FORMS = (PAIR, *((name,) for name in TURNS), (INSTRUCTION, OUTPUT))
"""Required fields of each row format."""
USUAL_PAIRS = (
    *(PAIR, ("prompt", "response"), ("question", "answer"), ("question", "response"), ("query", "response")),
    *(("user", "assistant"), ("input", "output"), (INSTRUCTION, OUTPUT), (INSTRUCTION, "response")),
)
"""Names of prompt and answer in common datasets and in the formats of LLaMA-Factory, Axolotl and TRL."""
CONTEXTS = (INPUT, "context")
"""Names of the input of an instruction, in Alpaca and in Dolly."""
KNOWN = {*TURNS, *CONTEXTS, *(name for pair in USUAL_PAIRS for name in pair)}
KEY = "data.fields"


@dataclass(frozen=True, slots=True)
class NamedRow:
    """A row with its fields renamed to the standard names."""

    fields: dict[str, Any]
    """Values by standard name; other fields keep their own names."""
    where: str
    """FILE:LINE."""
    original_names: dict[str, str]
    """Name in the row of each renamed field, by standard name."""
    left_out: tuple[str, ...]
    """Fields of another format than the one the config chose."""

    def with_original_names(self, error: UserError) -> UserError:
        """Return the error with the row's own field names in its message."""
        message = str(error)
        for name, column in self.original_names.items():
            message = message.replace(f"field {name!r}", f"field {column!r}")
        return UserError(message)


def name_rows(records: Iterable[Record], columns: Mapping[str, str], path: str, key: str = KEY) -> Iterator[NamedRow]:
    """Yield all rows of ``path`` under standard names. ``columns`` maps standard names to the rows' own, as set by
    ``key``; if it chooses no row format, the format is detected from each row's fields.

    Raises:
        UserError: a configured field is missing, or a row has two formats.
    """
    unseen = dict(columns)
    for record in records:
        for name in [name for name, column in unseen.items() if column in record.fields]:
            del unseen[name]
        yield name_fields(record.fields, columns, record.where, key)
    for name, column in unseen.items():
        raise UserError(f"{path}: no row has the field {column!r}, which {key}.{name} names; correct or remove it")


def name_fields(row: Mapping[str, Any], columns: Mapping[str, str], where: str, key: str = KEY) -> NamedRow:
    """Rename the fields of one row; see :func:`name_rows`."""
    chosen = next((form for form in FORMS if set(form) & columns.keys()), None)
    if chosen is None:
        renamed = {**_usual_names(row, where, key), **columns}
        retained = _without_empty_forms(row, renamed)
    else:
        _require(row, chosen, columns, where, key)
        renamed = dict(columns)
        used = {*chosen, *columns, *columns.values()}
        retained = {
            name: value for name, value in row.items() if name in used or not any(name in form for form in FORMS)
        }
    left_out = tuple(name for name in row if name not in retained and _has_value(row, name))
    original_names = {name: column for name, column in renamed.items() if name != column and column in row}
    _refuse_taken(retained, original_names, where)
    names = {column: name for name, column in original_names.items()}
    fields = {
        names.get(column, column): value
        for column, value in retained.items()
        if column in names or column not in original_names
    }
    for name in TURNS:
        if _is_json(fields.get(name)):
            fields[name] = _decode(fields[name], original_names.get(name, name), where)
    return NamedRow(fields, where, original_names, left_out)


def name_prompt(row: Mapping[str, Any], where: str) -> NamedRow:
    """Rename the fields of a row used as a prompt; it may include an answer.

    Raises:
        UserError: it has two prompts.
    """
    prompts = list(dict.fromkeys(pair[0] for pair in USUAL_PAIRS if _has_value(row, pair[0])))
    if INSTRUCTION in prompts:  # its input is not a prompt by itself
        prompts = [name for name in prompts if name != INPUT]
    turns = any(_has_turns(row, name) for name in TURNS)
    if len(prompts) > 1 and not turns:
        raise UserError(
            f"{where}: the row has {' and '.join(map(repr, prompts))}, which may both be the prompt; keep one"
        )
    original_names = {PAIR[0]: prompts[0]} if prompts and not turns and prompts[0] not in (PAIR[0], INSTRUCTION) else {}
    if prompts == [INSTRUCTION] and not turns and not _has_value(row, INPUT) and _has_value(row, "context"):
        original_names = {INPUT: "context"}
    names = {column: name for name, column in original_names.items()}
    fields = {names.get(name, name): value for name, value in row.items() if name not in original_names}
    for name in TURNS:
        if _is_json(fields.get(name)):
            fields[name] = _decode(fields[name], name, where)
    return NamedRow(fields, where, original_names, ())


def missing_field_error(
    found: Iterable[str], field: str, where: str, fix: str = "rename it, or set data.fields={text: NAME}"
) -> UserError:
    names = ", ".join(map(repr, found)) or "none"
    return UserError(f"{where}: field {field!r} is missing (found: {names}); {fix}")


def has_conversation(row: Mapping[str, Any]) -> bool:
    """Return True if the row's own field names make up a complete row format."""
    return bool(_usual_forms(row))


def _usual_forms(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    forms: list[tuple[str, ...]] = [(name,) for name in TURNS if _has_turns(row, name)]
    forms += [pair for pair in USUAL_PAIRS if all(_has_value(row, name) for name in pair)]
    return [form for form in forms if form != (INPUT, OUTPUT) or (INSTRUCTION, OUTPUT) not in forms]


def _usual_names(row: Mapping[str, Any], where: str, key: str) -> dict[str, str]:
    forms = _usual_forms(row)
    if len(forms) > 1:
        first, second = (" and ".join(map(repr, form)) for form in forms[:2])
        choice = _mapping(_read_as(forms[0], None))
        raise UserError(f"{where}: the row has {first}, and {second} too; say which to read, like {key}={choice}")
    if not forms or forms[0][0] in TURNS:
        return {}
    pair = forms[0]
    contexts = [name for name in CONTEXTS if name not in pair and _has_value(row, name)]
    if contexts and (pair[0] != INSTRUCTION or len(contexts) > 1):
        with_it = _mapping(_read_as(pair, contexts[-1], alpaca=True))
        without = _mapping(_read_as(pair, contexts[0] if len(contexts) > 1 else None))
        raise UserError(
            f"{where}: the row has field {contexts[-1]!r} beside {' and '.join(map(repr, (*pair, *contexts[:-1])))}; "
            f"read it with {key}={with_it}, or leave it out with {key}={without}"
        )
    return _read_as(pair, contexts[0] if contexts else None)


def _read_as(form: tuple[str, ...], context: str | None, *, alpaca: bool = False) -> dict[str, str]:
    if form[0] in TURNS:
        return {form[0]: form[0]}
    names = (INSTRUCTION, OUTPUT) if alpaca or form[0] == INSTRUCTION else PAIR
    return {**dict(zip(names, form)), **({INPUT: context} if context else {})}


def _mapping(columns: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {column}" for name, column in columns.items()) + "}"


def _has_value(row: Mapping[str, Any], name: str) -> bool:
    value = row.get(name)
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def _has_turns(row: Mapping[str, Any], name: str) -> bool:
    return _has_value(row, name) and (isinstance(row[name], list) or _is_json(row[name]))


def _is_json(value: Any) -> bool:
    """Return True for a JSON array in a string, as cells of tables hold lists."""
    return isinstance(value, str) and value.lstrip().startswith("[")


def _without_empty_forms(row: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Drop empty fields of other formats: tables that mix formats have a column for every field."""
    if not (renamed or any(_has_turns(row, name) for name in TURNS)):
        return dict(row)
    used = {*renamed.values()}
    return {name: value for name, value in row.items() if name in used or name not in KNOWN or _has_value(row, name)}


def _require(row: Mapping[str, Any], form: tuple[str, ...], columns: Mapping[str, str], where: str, key: str) -> None:
    for name in form:
        column = columns.get(name, name)
        if column not in row:
            fix = (
                f"{key}.{name} names it: correct that" if name in columns else f"set {key}.{name} to what it is called"
            )
            raise missing_field_error(row, column, where, fix)


def _refuse_taken(row: Mapping[str, Any], original_names: Mapping[str, str], where: str) -> None:
    for name, column in original_names.items():
        if name not in original_names.values() and _has_value(row, name):
            raise UserError(
                f"{where}: field {column!r} is read as {name}, and the row has a field {name!r} too; remove or rename "
                f"one of them"
            )


def _decode(text: str, column: str, where: str) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: field {column!r} must hold a list of messages: {json_fault(error)}") from error
