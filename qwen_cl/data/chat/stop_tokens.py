"""Tokens that end an answer, used by training, generation and export. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen_cl.config.data import MockDataConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.training import FinetuneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER, FUNCTION = "qwenclquestion", "qwenclanswer", "qwenclfunction"
"""Words that no template contains."""
ASKED = {"role": "user", "content": QUESTION}
ANSWERED = {"role": "assistant", "content": ANSWER}
CALL = {"type": "function", "id": "call00000", "function": {"name": FUNCTION, "arguments": {}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {
    "type": "function",
    "function": {
        "name": "tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def stop_tokens(tokenizer: PreTrainedTokenizerBase, named: Sequence[int], *, raw: bool) -> list[int]:
    """Return the stop tokens of raw text (``raw``) or answers: the tokenizer's EOS, those ``named`` in the model's
    files, and those of the chat template, which the files of a base model do not name."""
    return sorted({int(tokenizer.eos_token_id), *named, *([] if raw else end_of_turn_tokens(tokenizer))})


def end_of_turn_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens with which the chat template ends a last answer, an earlier answer, and a tool call;
    empty if there is no template or it ends answers with no special token."""
    ends = {
        _first_token(_rest(tokenizer, [ASKED, ANSWERED], ANSWER), tokenizer),
        _first_token(_between_turns(tokenizer), tokenizer),
        _last_token(_rest(tokenizer, [ASKED, CALLED], FUNCTION, tools=[TOOL]), tokenizer),
    }
    return sorted(end for end in ends if end is not None)


def has_stop_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the template ends a conversation's last answer with a special token."""
    return _first_token(_rest(tokenizer, [ASKED, ANSWERED], ANSWER), tokenizer) is not None


def missing_stop_token_warning(where: str) -> str:
    return (
        f"warning: {where}: its chat template ends an answer with no special token, so the model does not learn to "
        "stop, and answers run to their length limit; end answers in the template with eos_token or another special "
        "token, or set data.chat_template"
    )


def trains_on_conversations(config: RunConfig) -> bool:
    """Return True if a run trains on conversations, and so learns where answers end."""
    return isinstance(config.task, FinetuneConfig) and not isinstance(config.data, MockDataConfig)


def _rest(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], mark: str, **more: Any) -> str:
    """Return the rendered text after the last ``mark``."""
    _, found, after = _rendered(tokenizer, messages, **more).rpartition(mark)
    return after if found else ""


def _between_turns(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the rendered text between an answer and the next turn, without the start of that turn."""
    before, _, after = _rendered(tokenizer, [ASKED, ANSWERED, ASKED]).partition(ANSWER)
    start, between = before.partition(QUESTION)[0], after.partition(QUESTION)[0]
    end = next((end for end in range(len(between)) if start.endswith(between[end:])), len(between))
    return between[:end]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **more: Any) -> str:
    """Render the messages; empty if there is no template, or it refuses them."""
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **more))
    except Exception:  # a template may raise anything
        return ""


def _first_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    special = _special_tokens(tokenizer)
    places = [(place, -len(token)) for token in special if (place := text.find(token)) >= 0]
    if not places:
        return None
    place, length = min(places)
    return special[text[place : place - length]]


def _last_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    special = _special_tokens(tokenizer)
    endings = [token for token in special if text.rstrip().endswith(token)]
    return special[max(endings, key=len)] if endings else None


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)
    return {token: int(number) for token, number in (*added.items(), *named) if token.strip()}
