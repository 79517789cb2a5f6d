"""Writing systems of a text, by the Unicode names of its characters. No torch."""

from __future__ import annotations

import unicodedata
from collections import Counter

SYSTEMS = {"HIRAGANA": "hiragana", "KATAKANA": "katakana", "CJK UNIFIED": "kanji", "CJK COMPATIBILITY": "kanji"}
WRITING_SYSTEMS = ("hiragana", "katakana", "kanji", "latin", "other")


def writing_shares(characters: Counter[str]) -> dict[str, float]:
    """Return the fraction of each writing system, without whitespace; digits and punctuation are ``other``."""
    counts = dict.fromkeys(WRITING_SYSTEMS, 0)
    for character, count in characters.items():
        if not character.isspace():
            counts[writing_system(character)] += count
    total = sum(counts.values())
    return {name: count / total if total else 0.0 for name, count in counts.items()}


def writing_system(character: str) -> str:
    if character in "々〆〇":
        return "kanji"
    name = unicodedata.name(character, "").removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ")
    if name.startswith("KATAKANA-HIRAGANA"):  # ー, used almost only with katakana
        return "katakana"
    if name.startswith("LATIN") and character.isalpha():
        return "latin"
    return next((system for start, system in SYSTEMS.items() if name.startswith(start)), "other")
