"""Text in pictures as it was written: names in any script, and nothing read as math.

matplotlib draws a box for a letter that its font lacks, and warns. A font of the system that has the letters is used;
without one they are written in ASCII, as their code points where need be.
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
"""Of Linux, macOS and Windows, Japanese first."""


BUNDLED = "DejaVu Sans"
"""What matplotlib brings along and takes first."""


@contextmanager
def drawable_text(figure: Any) -> Iterator[None]:
    """While inside, save the figure: its titles, labels and notes have fonts for their letters, or are in ASCII."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    ticks = {id(tick) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklabels()}
    texts = [text for text in figure.findobj(Text) if text.get_text() and id(text) not in ticks]
    families = [BUNDLED, *_families_for("".join(text.get_text() for text in texts))]
    for text in texts:
        text.set_parse_math(False)  # a "$" of a name is one
        text.set_text(_readable(text.get_text(), families))
        text.set_fontfamily(families)
    with rc_context({"font.family": families}):
        yield


def _families_for(text: str) -> list[str]:
    """The fewest families of the system, in our order, with all letters that the bundled one lacks."""
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
    """matplotlib keeps a list of fonts from when it first ran, without those that were installed since."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {font.fname for font in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:
            with suppress(OSError, RuntimeError, UnicodeDecodeError):  # a file that is no font
                fontManager.addfont(path)


def _readable(text: str, families: list[str]) -> str:
    known = frozenset().union(*map(_letters, families))
    return "".join(letter if letter == "\n" or ord(letter) in known else _in_ascii(letter) for letter in text)


def _in_ascii(letter: str) -> str:
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or letter.encode("ascii", "backslashreplace").decode()


@cache
def _letters(family: str) -> frozenset[int]:
    """Code points that a family has; none where the system has no such family."""
    from matplotlib.font_manager import fontManager, get_font

    path = next((font.fname for font in fontManager.ttflist if font.name == family), None)
    return frozenset(get_font(path).get_charmap()) if path else frozenset()
