"""Names of special tokens in message content, encoded as ordinary text and never as the token. No torch.

The template's own special tokens must stay tokens at the same position, so that the tokenizer treats the text around
them (for example spaces) as before. So names in the content are marked before the template is rendered, all other
names are replaced after it, and a copy of the tokenizer knows only the replaced names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.template import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE = [chr(code) for code in range(0xE000, 0xE0F0)]
"""Private-use characters of Unicode, which texts hardly ever contain."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Three characters that do not occur in the row."""

    opening: str
    closing: str
    prefix: str
    """Prefix of the names of special tokens in the copy of the tokenizer."""
    shown: str
    """First name found, for messages."""

    def remove(self, text: str) -> str:
        return text.replace(self.opening, "").replace(self.closing, "")


class ContentTokens:
    """The special tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._copies: dict[str, Any] = {}

    def marks_for(self, texts: Iterable[str]) -> Marks | None:
        """Return marks for these texts; None if no text contains the name of a special token."""
        if self._names is None:
            return None
        candidates = [text for text in texts if any(first in text for first in self._firsts)]
        found = next((match for text in candidates if (match := self._names.search(text))), None)
        if found is None:
            return None
        used = set("".join(candidates))
        opening, closing, prefix = [each for each in PRIVATE if each not in used][:3]
        return Marks(opening, closing, prefix, found[0])

    def mark(self, text: str, marks: Marks) -> str:
        assert self._names is not None
        return self._names.sub(lambda match: f"{marks.opening}{match[0]}{marks.closing}", text)

    def unmark(self, text: str, spans: list[Span], marks: Marks | None) -> tuple[str, list[Span]]:
        """Return the text to encode, with the template's special tokens renamed, and the spans moved accordingly."""
        if marks is None:
            return text, spans
        assert self._names is not None
        inner = self._names.pattern
        pattern = re.compile(f"{marks.opening}({inner}){marks.closing}|({inner})|[{marks.opening}{marks.closing}]")
        parts: list[str] = []
        moves = [(0, 0)]  # from this position on, the offset in characters
        done = length = 0
        for match in pattern.finditer(text):
            new = match[1] or (marks.prefix + match[2] if match[2] else "")
            parts += [text[done : match.start()], new]
            length += match.start() - done + len(new)
            done = match.end()
            moves.append((done, length - done))
        parts.append(text[done:])

        def moved(place: int) -> int:
            return place + next(by for at, by in reversed(moves) if at <= place)

        return "".join(parts), [(moved(start), moved(stop)) for start, stop in spans]

    def encode(self, text: str, marks: Marks | None) -> tuple[list[int], list[Span]]:
        """Return the token ids and the character range of each."""
        if marks is None:
            made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(made["input_ids"]), list(made["offset_mapping"])
        found = self._copy(marks.prefix).encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    @cached_property
    def _special(self) -> dict[str, int]:
        decoder = self._tokenizer.added_tokens_decoder
        return {token.content: number for number, token in decoder.items() if token.special and token.content}

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        names = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @cached_property
    def _firsts(self) -> set[str]:
        return {name[0] for name in self._special}

    def _copy(self, prefix: str) -> Any:
        if prefix not in self._copies:
            self._copies[prefix] = self._renamed(prefix)
        return self._copies[prefix]

    def _renamed(self, prefix: str) -> Any:
        """Return a copy of the tokenizer with prefixed special tokens, added beside the old names so that ids stay."""
        from tokenizers import Tokenizer

        described = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in described["added_tokens"]:
            if token["special"]:
                token["content"] = prefix + token["content"]
        vocabulary = described["model"].get("vocab")
        if isinstance(vocabulary, dict):
            vocabulary |= {prefix + name: number for name, number in self._special.items()}
        elif isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of their ids
            for name, number in self._special.items():
                if number < len(vocabulary):
                    vocabulary[number][0] = prefix + name
        copy = Tokenizer.from_str(json.dumps(described))
        if any(copy.token_to_id(prefix + name) != number for name, number in self._special.items()):
            raise UserError(
                "the model's tokenizer cannot tell special tokens from their names in texts, and a row contains "
                "such a name; remove it, or write data.special_tokens_in_content=true"
            )
        return copy
