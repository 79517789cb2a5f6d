"""Values passed to chat templates: tool call arguments, and the strings within nested values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from qwen_cl.data.chat.messages import is_empty


def probe_call(arguments: Any) -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}


def with_arguments(call: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if "arguments" not in function:
        return call
    made = {**function, "arguments": form(function["arguments"])}
    return {**call, "function": made} if "function" in call else made


def as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return {} if is_empty(arguments) else arguments
    return json.loads(arguments) if arguments.strip() else {}


def as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from strings_in(key)
            yield from strings_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings_in(each)


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return the value with every string in it changed, including keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): with_strings(each, change) for key, each in value.items()}
    return [with_strings(each, change) for each in value] if isinstance(value, list) else value
