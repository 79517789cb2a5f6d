"""The text in plots: names in any script, and no math markup.

matplotlib draws a box for a character that its font lacks, and warns. A system font that has the characters is used;
without one they are written in ASCII, or as their code points.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

FAMILIES = (
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "IPAexGothic",
    "IPAGothic",
    "Hiragino Sans",
    "Hiragino Kaku Gothic Pro",
    "Yu Gothic",
    "Meiryo",
    "MS Gothic",
    "TakaoGothic",
    "VL Gothic",
    "Noto Sans CJK SC",
    "Noto Sans CJK TC",
    "Noto Sans CJK KR",
    "Source Han Sans JP",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "SimHei",
    "Apple SD Gothic Neo",
    "Malgun Gothic",
    "NanumGothic",
    "Droid Sans Fallback",
    "Arial Unicode MS",
)
"""Font families of Linux, macOS and Windows, Japanese first."""


BUNDLED = "DejaVu Sans"
"""The default font, which comes with matplotlib."""


@contextmanager
def drawable_text(figure: Any) -> Iterator[None]:
    """Give the figure's titles, labels and notes fonts for their characters, or ASCII text. Save the figure inside."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    ticks = {id(tick) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklabels()}
    texts = [text for text in figure.findobj(Text) if text.get_text() and id(text) not in ticks]
    families = [BUNDLED, *families_for("".join(text.get_text() for text in texts))]
    for text in texts:
        text.set_parse_math(False)  # a "$" in a name is not math
        text.set_text(_readable(text.get_text(), families))
        text.set_fontfamily(families)
    with rc_context({"font.family": families}):
        yield


def families_for(text: str) -> list[str]:
    """Return the installed families, in the order of FAMILIES, that cover the characters the bundled font lacks."""
    missing = set(map(ord, text)) - _letters(BUNDLED)
    if not missing:
        return []
    _notice_new_fonts()
    families = []
    for family in FAMILIES:
        if missing & _letters(family):
            families.append(family)
            missing -= _letters(family)
    return families


@cache
def _notice_new_fonts() -> None:
    """Add fonts to matplotlib's cached list that were installed since it was written."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {font.fname for font in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:
            with suppress(OSError, RuntimeError, UnicodeDecodeError):  # not a font file
                fontManager.addfont(path)


def _readable(text: str, families: list[str]) -> str:
    known = frozenset().union(*map(_letters, families))
    return "".join(letter if letter == "\n" or ord(letter) in known else _in_ascii(letter) for letter in text)


def _in_ascii(letter: str) -> str:
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or letter.encode("ascii", "backslashreplace").decode()


@cache
def _letters(family: str) -> frozenset[int]:
    """Return the code points that a family has; empty if it is not installed."""
    from matplotlib.font_manager import fontManager, get_font

    path = next((font.fname for font in fontManager.ttflist if font.name == family), None)
    return frozenset(get_font(path).get_charmap()) if path else frozenset()
