"""The text of --help: conf/help.txt, with the choices that conf/ has."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

WIDTH = 120
GROUP = re.compile(r"^  (\w+) +.*: \{choices\}$", re.MULTILINE)


def read_help(conf: Path) -> str:
    """Return conf/help.txt with ``{choices}`` replaced by the choices of the group that the line begins with."""
    text = (conf / "help.txt").read_text(encoding="utf-8")
    return GROUP.sub(lambda line: _with_choices(line, conf), text)


def _with_choices(line: re.Match[str], conf: Path) -> str:
    names = [path.stem for path in (conf / line[1]).glob("*.yaml") if not path.stem.startswith("_")]
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    filled = line[0].replace("{choices}", ", ".join(names))
    return textwrap.fill(filled, WIDTH, subsequent_indent=" " * 14, break_on_hyphens=False, drop_whitespace=True)
