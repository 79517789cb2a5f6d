"""Text normalization for duplicate and overlap detection. No torch."""

from __future__ import annotations

import hashlib
import json
import unicodedata

from qwen_cl.data.chat.conversations import SYSTEM, Message
from qwen_cl.data.rows import Row, Text


def row_text(row: Row) -> str:
    """Return the text of a row: a document, or all messages but the system message, which rows share."""
    if isinstance(row, Text):
        return row.text
    return "\n".join(_message_text(message) for message in row.messages if message.role != SYSTEM)


def _message_text(message: Message) -> str:
    if not message.more:
        return message.content
    more = {key: value for key, value in message.more.items() if key != "content"}
    return message.content + (json.dumps(more, ensure_ascii=False, sort_keys=True) if more else "")


def normalize(text: str) -> str:
    """Apply NFKC, which unifies half and full width, and collapse whitespace to single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def text_key(normalized: str) -> bytes:
    """Return a 16-byte hash of a normalized text."""
    return hashlib.sha256(normalized.encode()).digest()[:16]
