"""Select the prose of a page and split it into documents without repeated paragraphs."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator

from benchmarks.texts.formats import HEADING, Page

SHORTEST, USUAL, LONGEST = 500, 4000, 20000  # characters of a document
HELD_OUT = 50  # one document in 50 validates

JAPANESE = r"\u3040-\u30ff\u3400-\u9fff々ー"
WIDE = JAPANESE + r"\u3000-\u303f\uff00-\uffef"
FUNCTION_WORDS = re.compile(
    r"\b(the|of|and|to|a|an|in|is|it|that|for|on|with|as|are|be|this|you|or|by|not|from|if|can|was|he|i|have|we)\b",
    re.IGNORECASE,
)
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": " - ", "…": "...", "\u00ad": None})


class Documents:
    """A splitter of pages into documents of one language, which drops paragraphs that it has seen before."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._seen: set[bytes] = set()

    def of(self, page: Page) -> Iterator[str]:
        """Yield documents of 500 to 20000 characters, split at headings, or between paragraphs of a long section."""
        for document in _pack(self._sections(page)):
            if SHORTEST <= len(document) <= LONGEST:
                yield document

    def _sections(self, page: Page) -> Iterator[list[str]]:
        heading, section = "", list[str]()
        for raw in page:
            if raw.startswith(HEADING):
                if section:
                    yield section
                heading, section = clean(raw.strip(HEADING), self.language), []
                continue
            text = clean(raw, self.language)
            if not is_prose(text, self.language) or not self._new(text):
                continue
            if not section and heading:
                section.append(heading)
            section.append(text)
        if section:
            yield section

    def _new(self, paragraph: str) -> bool:
        """Return False if the paragraph differs from an earlier one only in digits, case and punctuation."""
        key = hashlib.blake2b(re.sub(r"[\W\d]+", "", paragraph.lower()).encode(), digest_size=12).digest()
        fresh = key not in self._seen
        self._seen.add(key)
        return fresh


def is_held_out(document: str) -> bool:
    """Return whether the document validates, by its own hash, so that other documents do not change its split."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % HELD_OUT == 0


def clean(text: str, language: str) -> str:
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[¶\u200b-\u200f\ufeff\ue000-\uf8ff\ufffd]|\[\d+\]", "", text)
    text = re.sub(r"^[\s•·*◦▪-]+ |^\(?\d+(\.\d+)*[.)]? +", "", re.sub(r"\s+", " ", text).strip())
    if language == "japanese":
        # A line break within a Japanese sentence is not a space.
        return re.sub(rf"(?<=[{WIDE}]) (?=[{WIDE}])", "", text)
    return re.sub(r" {2,}", " ", text.translate(PLAIN))


def is_prose(text: str, language: str) -> bool:
    """Return whether the text is sentences of the language, not code, a menu entry, a list of names or another one."""
    if language == "japanese":
        letters = len(re.findall(rf"[{JAPANESE}]", text))
        return letters >= 15 and letters >= 0.5 * len(text) and bool(re.search(r"[。！？]", text))
    words = text.split()
    if len(words) < 7 or not re.search(r"[.!?:][\"')]*$", text):
        return False
    letters = sum(character.isascii() and character.isalpha() for character in text)
    spaces = len(words) - 1
    plain = letters + spaces >= 0.9 * len(text) and letters <= 9 * (spaces + 1)
    symbols = len(re.findall(r"[{}<>|\\=_@#$%^~`]", text))
    return plain and symbols <= 0.02 * len(text) and len(FUNCTION_WORDS.findall(text)) >= 0.15 * len(words)


def _pack(sections: Iterator[list[str]]) -> Iterator[str]:
    """Yield sections joined up to the usual length; longer sections are split."""
    document: list[str] = []
    length = 0
    for section in sections:
        if length >= SHORTEST and length + sum(map(len, section)) > USUAL:
            yield "\n\n".join(document)
            document, length = [], 0
        for paragraph in section:
            if length >= SHORTEST and length + len(paragraph) > 2 * USUAL:
                yield "\n\n".join(document)
                document, length = [], 0
            document.append(paragraph)
            length += len(paragraph) + 2
    if document:
        yield "\n\n".join(document)
