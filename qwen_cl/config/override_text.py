"""Quoting of overrides for Hydra's grammar. User documentation: docs/command-line.md.

Hydra reads a value as a number, a list, a sweep or a word of a few letters, and refuses most other characters. What it
refuses is text; so is all that a key for text says.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, Sweep, ValueType
from hydra.errors import HydraException

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import key_fields
from qwen_cl.config.overrides import override_key, quoted

AS_TYPED = "task.prompt"
"""The key whose value is neither interpolated nor swept."""
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
OPENING, CLOSING = "[{(", "]})"


def quote_arguments(arguments: list[str]) -> list[str]:
    """Quote all overrides by :func:`quote_free_text`; Hydra's own options stay.

    Raises:
        UserError: one is no override, as where a shell has split a value at its blanks, or chooses a part of choices.
    """
    for before, after in pairwise(arguments):
        if "=" in before and not before.startswith("-") and not re.match(r"[-~]|.*=", after, re.DOTALL):
            raise UserError(
                f"{after}: an override reads KEY=VALUE; if it belongs to the one before, quote both for the shell: "
                f"{printed(f'{before} {after}')}"
            )
    refuse_parts(arguments)
    multirun = bool({"-m", "--multirun"} & set(arguments))
    return [each if each.startswith("-") else quote_free_text(each, multirun=multirun) for each in arguments]


def refuse_parts(overrides: Sequence[str]) -> None:
    """Refuse a file such as conf/cluster/_parallelism.yaml, which the choices of its group share, as a choice.

    Raises:
        UserError: names the group and the file.
    """
    from qwen_cl.config.store import GROUPS

    for override in overrides:
        group, values = override_key(override), override.partition("=")[2]
        if part := next((value for value in values.split(",") if group in GROUPS and value.startswith("_")), None):
            raise UserError(
                f"{group}={part}: no such choice; a name with _ in front is that of a part which the choices share. "
                "python launch.py --help lists the choices"
            )


def quote_free_text(argument: str, *, multirun: bool = False) -> str:
    """Quote the value of an override where Hydra would refuse it, or take text for something else.

    Quoted text, null, interpolations and sweeps are unchanged, so quoting twice has no effect.
    """
    name, equals, value = argument.partition("=")
    key = override_key(argument)
    if not equals or value == "null" or name.startswith("~"):
        return argument
    parsed = _parse(f"{name}={value}")
    if key == AS_TYPED:
        read = parsed and _value_of(parsed)
        return f"{name}={_quoted_as_typed(read, value) if isinstance(read, QuotedString) else quoted(escape(value))}"
    if parsed is None:
        return _parsed_in_parts(name, value, multirun=multirun) or f"{name}={quoted(value)}"
    if key in _text_keys() and _is_misread(parsed, value, multirun=multirun):
        return f"{name}={quoted(value)}"
    return argument


def escape(text: str) -> str:
    """Escape a text for OmegaConf, in which ``${`` would be an interpolation."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def unescape(text: str) -> str:
    """Undo :func:`escape`."""
    return re.sub(r"(\\+)\$\{", lambda match: match[1][: len(match[1]) // 2] + "${", text)


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of a config with every text in it changed; rules are not checked again."""
    if isinstance(value, str) and not isinstance(value, Enum):
        return change(value)
    if isinstance(value, dict):
        return {name: map_text(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [map_text(part, change) for part in value]
    if not is_dataclass(value):
        return value
    copied = copy(value)
    for field in fields(value):
        setattr(copied, field.name, map_text(getattr(value, field.name), change))
    return copied


def printed(override: str) -> str:
    """Return an override quoted for Hydra and for a shell."""
    return shlex.quote(quote_free_text(override))


def printed_path(key: str, path: object) -> str:
    """Return ``key=PATH`` quoted as by :func:`printed`, with ``${`` in the path escaped."""
    text = str(path)
    return printed(f"{key}={text}" if escape(text) == text else f"{key}={quoted(escape(text))}")


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _parse(override: str) -> Override | None:
    try:
        parsed: Override = _parser().parse_override(override)
        return parsed
    except HydraException:
        return None


def _value_of(parsed: Override) -> Any:
    """Return the value with its quotes, which ``value()`` removes."""
    return parsed._value


def _is_misread(parsed: Override, value: str, *, multirun: bool) -> bool:
    read = _value_of(parsed)
    if isinstance(read, QuotedString | Glob) or "${" in value:
        return False
    if isinstance(read, Sweep):
        return parsed.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not multirun
    if isinstance(read, str):
        return read != value and "\\" not in value  # blanks at its ends
    return read is not None  # a number, true, a list: the text would come out as Python writes it


def _parsed_in_parts(name: str, value: str, *, multirun: bool) -> str | None:
    """Quote the unreadable parts of a list, mapping or sweep; return None for other values."""
    if value[:1] in ("[", "{") and value[-1:] == CLOSING[OPENING.index(value[0])]:
        parts = [_quoted_part(part, is_pair=value[0] == "{") for part in _split(value[1:-1])]
        candidate = f"{name}={value[0]}{','.join(parts)}{value[-1]}"
    elif multirun and "," in value:
        candidate = f"{name}={','.join(_quoted_part(part, is_pair=False) for part in _split(value))}"
    else:
        return None
    return candidate if _parse(candidate) else None


def _quoted_part(part: str, *, is_pair: bool) -> str:
    name, colon, value = part.partition(":") if is_pair else ("", "", part)
    value = value.strip()
    if value[:1] in ("[", "{"):
        inner = _parsed_in_parts("x", value, multirun=False)
        return f"{name}{colon}{inner[2:] if inner else value}"
    return f"{name}{colon}{value if _parse(f'x={value}') else quoted(value)}"


def _split(text: str) -> Iterator[str]:
    """Split at commas outside brackets and quotes."""
    depth, start, quote = 0, 0, ""
    for place, each in enumerate(text):
        if quote:
            quote = "" if each == quote and text[place - 1] != "\\" else quote
        elif each in "'\"":
            quote = each
        elif each in OPENING + CLOSING:
            depth += 1 if each in OPENING else -1
        elif each == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _quoted_as_typed(read: QuotedString, value: str) -> str:
    """Escape every ``${`` that is not escaped yet."""
    text = re.sub(r"(\\*)\$\{", lambda match: match[0] if len(match[1]) % 2 else f"{match[1]}\\${{", read.text)
    return value if text == read.text else quoted(text)


@cache
def _text_keys() -> frozenset[str]:
    """Return every key whose value is text: paths, names, prompts."""
    return frozenset({*(key for key, field in key_fields().items() if field.type in ("str", "str | None")), *FOLDERS})
