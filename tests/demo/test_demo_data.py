"""The sample sets written for the project: their size, their language, and that none repeats another."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "qwen_cl/demo/data"
JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff々ー]")


def texts(name: str) -> list[str]:
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    assert all(list(row) == ["text"] and row["text"] == row["text"].strip() for row in rows)
    return [row["text"] for row in rows]


def pieces(text: str, language: str) -> set[tuple[str, ...]]:
    """Seven words in a row of English, thirteen characters in a row of Japanese."""
    units, length = (list(text), 13) if language == "japanese" else (re.findall(r"\w+", text.lower()), 7)
    return {tuple(units[start : start + length]) for start in range(len(units) - length + 1)}


@pytest.mark.parametrize(
    ("name", "count", "language", "words"),
    [
        ("text.train.jsonl", 240, "japanese", None),
        ("text.validation.jsonl", 40, "japanese", None),
        ("retention-english.jsonl", 60, "english", range(60, 121)),
        ("replay-english.train.jsonl", 120, "english", range(60, 121)),
    ],
)
def test_every_row_is_of_its_language_and_length(name: str, count: int, language: str, words: range | None) -> None:
    found = texts(name)
    assert len(found) == count
    for text in found:
        letters = [character for character in text if character.isalpha()]
        share = len(JAPANESE.findall(text)) / len(letters)
        assert share > 0.9 if language == "japanese" else text.isascii(), text
        sentences = len(re.findall(r"[。！？]|[.?!](?=\s|$)", text))
        assert sentences >= 2, text
        assert words is None or len(text.split()) in words, text


@pytest.mark.parametrize(
    ("names", "language"),
    [
        (("text.train.jsonl", "text.validation.jsonl"), "japanese"),
        (("retention-english.jsonl", "replay-english.train.jsonl"), "english"),
    ],
)
def test_no_row_repeats_another(names: tuple[str, str], language: str) -> None:
    sets = [[pieces(text, language) for text in texts(name)] for name in names]
    # What is measured has no piece in common with what is trained on ...
    train, measured = sets if language == "japanese" else reversed(sets)
    shared = set().union(*train) & set().union(*measured)
    assert shared == set()
    # ... and within a set a fifth of a text is the most that another says too.
    for one, other in itertools.combinations(sets[0] + sets[1], 2):
        assert len(one & other) < 0.2 * min(len(one), len(other))


@pytest.mark.parametrize("language", ["english", "japanese"])
def test_prompts_are_openings(language: str) -> None:
    prompts = (DATA / f"{language}-prompts.txt").read_text(encoding="utf-8").splitlines()
    rows = [row for path in sorted(DATA.glob("*.jsonl")) for row in path.read_text(encoding="utf-8").splitlines()]
    assert len(set(prompts)) == 5
    for prompt in prompts:
        assert bool(JAPANESE.search(prompt)) is (language == "japanese")
        assert not prompt.endswith((".", "。"))
        # The opening of a row that is trained on would show memory, not language.
        assert not any(row.startswith(json.dumps({"text": prompt}, ensure_ascii=False)[:-2]) for row in rows)
