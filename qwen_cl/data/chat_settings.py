"""What a run's config says of how conversations are rendered. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """The defaults leave everything to the tokenizer's own template."""

    system_prompt: str | None = None
    """Of conversations without a system message."""
    special_tokens_in_content: bool = False
    """A special token's name in a message is that token; else it is text."""
    template_date: str | None = None
    """ISO date that templates are told is today's; None for today's own."""
    chat_template: str | None = None
    """The text of a template in place of the tokenizer's."""
