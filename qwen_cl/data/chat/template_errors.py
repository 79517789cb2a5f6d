"""Error messages of chat templates, without Python terms. No torch."""

from __future__ import annotations

import re
import traceback

MISSING = re.compile(r".* has no (?P<kind>attribute|element) (?P<field>.+)")
UNDEFINED = re.compile(r"'(?P<name>\w+)' is undefined")
LENGTH = 300


def describe_template_error(error: Exception) -> str:
    """Return one line: the template's own message, or the line and cause of its failure."""
    import jinja2

    text = " ".join(str(error).split())[:LENGTH]
    if found := MISSING.fullmatch(text):
        number = "number " if found["kind"] == "element" else ""
        return f"it looks for {number}{found['field']}, which is not there{_line(error)}"
    if found := UNDEFINED.fullmatch(text):
        return f"it looks for {found['name']}, which is not there{_line(error)}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"it is not a valid template: {text} (line {error.lineno})"
    if isinstance(error, jinja2.TemplateError):  # its own raise_exception
        return text or "no message"
    return f"it cannot handle the form of a value here{_line(error)}"


def _line(error: Exception) -> str:
    """Return the line of the template that failed, from Jinja's frames."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f" (line {lines[-1]} of the template)" if lines else ""
