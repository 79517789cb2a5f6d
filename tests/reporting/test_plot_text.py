"""Plots show names in any script, or write them in ASCII: no boxes, no warnings, no math."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from qwen_cl.reporting import plot_text
from qwen_cl.reporting.forgetting import draw_report

RECORDS = [
    {"step": step, "val/target/loss": 2.0 - step, "retention/英語/loss": 2.0 + step / 10, "retention/a$b$c/loss": 1.0}
    for step in (0, 1)
]


def _draw(title: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the texts of the plot as they were drawn."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn: list[str] = []
    save = Figure.savefig

    def recorded(figure: Figure, *arguments: object, **more: object) -> None:
        save(figure, *arguments, **more)  # type: ignore[arg-type]
        drawn.extend(text.get_text() for text in figure.findobj(Text))
        assert not any(text.get_parse_math() for text in figure.findobj(Text) if "$b$" in text.get_text())

    monkeypatch.setattr(Figure, "savefig", recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_report(RECORDS, title, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return drawn


def test_without_a_font_names_are_in_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot_text, "FAMILIES", ())
    drawn = _draw("日本 ＡＢ 1=a$b'c été", tmp_path / "report.png", monkeypatch)
    assert "\\u65e5\\u672c AB 1=a$b'c été" in "\n".join(drawn)
    assert any("retention \\u82f1\\u8a9e: 2.000 to 2.100" in text for text in drawn)


def test_a_font_of_the_system_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not plot_text.families_for("日本"):
        pytest.skip("this machine has no font with Japanese letters")
    drawn = _draw("日本 (1)=a$b'c", tmp_path / "report.png", monkeypatch)
    assert "日本 (1)=a$b'c" in drawn
    assert any("retention 英語" in text for text in drawn)


def test_latin_text_needs_no_other_font() -> None:
    assert plot_text.families_for("Learning and forgetting, été") == []
