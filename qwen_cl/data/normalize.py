"""When two texts are the same to the data report and to the search for overlap. No torch."""

from __future__ import annotations

import hashlib
import json
import unicodedata

from qwen_cl.data.chat.conversations import SYSTEM, Message
from qwen_cl.data.rows import Row, Text


def row_text(row: Row) -> str:
    """What a row says: a document, or what is asked and answered. Not the system message, which rows share."""
    if isinstance(row, Text):
        return row.text
    return "\n".join(_said(message) for message in row.messages if message.role != SYSTEM)


def _said(message: Message) -> str:
    if not message.more:
        return message.content
    more = {key: value for key, value in message.more.items() if key != "content"}
    return message.content + (json.dumps(more, ensure_ascii=False, sort_keys=True) if more else "")


def normalize(text: str) -> str:
    """NFKC (half and full width are one), every run of whitespace a single space."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def text_key(normalized: str) -> bytes:
    """16 bytes that stand for the text."""
    return hashlib.sha256(normalized.encode()).digest()[:16]
