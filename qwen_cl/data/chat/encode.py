"""Encoding of conversations by the model's chat template: token ids and loss tokens. No torch.

The ids are those of ``tokenizer.apply_chat_template(…, tokenize=True)`` of the complete row, without the newlines
after the last turn, which the model is not trained to generate. User documentation: docs/conversations.md.
"""

from __future__ import annotations

import weakref
from datetime import date
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import LossOn
from qwen_cl.data.chat.answer_spans import locate_answers
from qwen_cl.data.chat.content_tokens import ContentTokens, Marks
from qwen_cl.data.chat.conversations import ASSISTANT, SYSTEM, Conversation
from qwen_cl.data.chat.messages import DEVELOPER, Message
from qwen_cl.data.chat.settings import ChatSettings
from qwen_cl.data.chat.template import ChatTemplate, Rendering, Span
from qwen_cl.data.chat.template_use import TemplateUse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_chats: weakref.WeakKeyDictionary[Any, Chat] = weakref.WeakKeyDictionary()


def use_chat_settings(tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> PreTrainedTokenizerBase:
    """Set how conversations are rendered with this tokenizer from now on. Returns the tokenizer."""
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    _chats[tokenizer] = Chat(tokenizer, settings)
    return tokenizer


def render_conversation(
    row: Conversation, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> tuple[list[int], tuple[Span, ...]]:
    """Return the token ids of a conversation, and the half-open ranges of its loss tokens, never the first token.

    Raises:
        UserError: the template refuses the row or drops part of it, or an answer cannot be located.
    """
    return chat_of(tokenizer).tokenize(row, loss_on)


def render_prompt(row: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids up to the start of the model's answer. Raises UserError as :func:`render_conversation`."""
    return chat_of(tokenizer).tokenize_prompt(row)


def check_conversation(row: Conversation, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
    """Refuse a row that :func:`render_conversation` would refuse, without tokenizing. Raises UserError."""
    chat_of(tokenizer).locate(row, loss_on)


def unused_fields(row: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the names of the row's fields that are not rendered."""
    return chat_of(tokenizer).unused(row)


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    if tokenizer not in _chats:
        _chats[tokenizer] = Chat(tokenizer, ChatSettings())
    return _chats[tokenizer]


class Chat:
    """The renderer of a tokenizer's conversations, with what is computed once for all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> None:
        day = None if settings.template_date is None else date.fromisoformat(settings.template_date)
        self._template = ChatTemplate(tokenizer, day)
        self._tokens = ContentTokens(tokenizer)
        self._use = TemplateUse()
        self._settings = settings

    def tokenize(self, row: Conversation, loss_on: LossOn) -> tuple[list[int], tuple[Span, ...]]:
        whole, spans, end, marks = self._located(row, loss_on)
        text, (*spans, (_, end)) = self._tokens.unmark(whole, [*spans, (0, end)], marks)
        ids, offsets = self._tokens.encode(text, marks)
        while ids and offsets[-1][0] >= end:
            ids.pop()
            offsets.pop()
        return ids, _token_ranges(offsets, spans)

    def tokenize_prompt(self, row: Conversation) -> list[int]:
        rendering, marks = self._rendering(row, prompt=True)
        text = rendering.render(prompt=True)
        self._use.check(rendering, text, prompt=True)
        return self._tokens.encode(self._tokens.unmark(text, [], marks)[0], marks)[0]

    def locate(self, row: Conversation, loss_on: LossOn) -> None:
        self._located(row, loss_on)

    def unused(self, row: Conversation) -> tuple[str, ...]:
        if all(message.more is None for message in row.messages):
            return row.unused
        rendering, _ = self._rendering(row)
        return row.unused + self._use.check(rendering, rendering.render())

    def _located(self, row: Conversation, loss_on: LossOn) -> tuple[str, list[Span], int, Marks | None]:
        """Return the rendered text, its spans in the loss, the end of the last turn, and the marks in the text."""
        rendering, marks = self._rendering(row)
        whole, generated = rendering.render_whole()
        self._use.check(rendering, whole)
        end = max([len(whole.rstrip("\n")), *(stop for _, stop in generated or ())])
        answers = [(number, each.trained) for number, each in enumerate(rendering.messages) if each.role == ASSISTANT]
        if loss_on is LossOn.all:
            context = [number for number, trained in answers if not trained]
            return whole, _complement(locate_answers(rendering, whole, context), end), end, marks
        in_loss = answers[-1:] if loss_on is LossOn.last_assistant else answers
        wanted = [number for number, trained in in_loss if trained]
        if generated is not None and len(wanted) == len(answers):
            return whole, generated, end, marks
        spans = [(start, min(stop, end)) for start, stop in locate_answers(rendering, whole, wanted)]
        if generated is not None:
            spans = [(a, b) for a, b in generated if any(a < stop and start < b for start, stop in spans)]
        return whole, spans, end, marks

    def _rendering(self, row: Conversation, *, prompt: bool = False) -> tuple[Rendering, Marks | None]:
        """Prepare the rendering, with names of special tokens marked if the row has any and they are to stay text."""
        messages = row.messages
        if self._settings.system_prompt is not None and messages[0].role not in (SYSTEM, DEVELOPER):
            messages = (Message(SYSTEM, self._settings.system_prompt), *messages)
        rendering = self._template.prepare(row, messages)
        if self._settings.special_tokens_in_content:
            return rendering, None
        marks = self._tokens.marks_for(rendering.content())
        if marks is None:
            return rendering, None
        marked = rendering.with_marks(self._tokens, marks)
        if marks.remove(marked.render(prompt=prompt)) != rendering.render(prompt=prompt):
            raise UserError(
                f"{row.where or 'the prompt'}: a text contains the name of a special token ({marks.shown}), which the "
                "chat template changes, so it cannot stay text; remove it, or write data.special_tokens_in_content=true"
            )
        return marked, marks


def _complement(spans: list[Span], end: int) -> list[Span]:
    edges = [0, *(edge for span in spans for edge in span), end]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]


def _token_ranges(offsets: list[Span], spans: list[Span]) -> tuple[Span, ...]:
    """Convert character spans to token ranges; a token belongs to the span of its characters, as in transformers."""
    ranges: list[Span] = []
    token = 0
    for start, stop in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < stop:
            token += 1
        first = max(first, 1)  # the first token has no context to be predicted from
        if first < token:
            ranges.append((first, token))
    return tuple(ranges)


def check_chat_template(
    tokenizer: PreTrainedTokenizerBase, directory: str, otherwise: str = "use task=pretrain"
) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"{directory}: its tokenizer has no chat template, which conversations are rendered with; "
            f"set data.chat_template (a file, or a built-in one like chatml), or {otherwise}"
        )
