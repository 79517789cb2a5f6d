"""Prompts from the command line or a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.data import TURNS
from qwen_cl.config.errors import UserError
from qwen_cl.data.chat.conversations import USER, Conversation, Message, check_text, parse_prompt
from qwen_cl.data.chat.encode import check_chat_template, render_prompt
from qwen_cl.data.corpus.documents import read_records
from qwen_cl.data.corpus.files import Format, find_files, format_of
from qwen_cl.data.corpus.record import Record
from qwen_cl.data.fields import INSTRUCTION, name_prompt
from qwen_cl.data.hub_copy import plain_json
from qwen_cl.data.jsonl import numbered_lines
from qwen_cl.data.raw_text import encode_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation to answer, or a raw text to continue."""

    conversation: Conversation
    """The conversation, whose last message is answered; a raw prompt is its only message."""
    row: dict[str, Any]
    """The row as the file has it, for the output."""

    @property
    def last(self) -> str:
        """The text of the last message."""
        return self.conversation.messages[-1].content


def one_prompt(text: str) -> Prompt:
    """Return ``task.prompt`` as a prompt."""
    return _parse_line(text, "task.prompt")


def read_prompts(path: Path, *, raw: bool) -> list[Prompt]:
    """Read a file of prompts: a prompt per row in the formats that training reads, or per line of a text file.

    Raises:
        UserError: names file and line of the first invalid prompt.
    """
    if format_of(path)[0] in (None, Format.text) or not path.is_file():
        prompts = [_parse_line(line, where) for line, where in numbered_lines(path, "task.prompts")]
    else:
        files = find_files(str(path), "task.prompts", "or a text file with a prompt a line")
        prompts = [_parse_row(record) for record in read_records(files, None)]
    if not prompts:
        raise UserError(f"{path} is empty; it must hold rows with prompt or messages")
    if raw and (several := next((prompt for prompt in prompts if not _is_text(prompt)), None)):
        raise UserError(
            f"{several.conversation.where}: task.raw=true continues texts, and this row is a conversation; write the "
            "field prompt alone"
        )
    return prompts


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, raw: bool) -> list[int]:
    """Return the token ids: of a conversation as in training, of a raw text as the tokenizer starts a document."""
    if raw:
        return encode_start(tokenizer, prompt.last)
    return render_prompt(prompt.conversation, tokenizer)


def check_prompts(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, directory: Path, *, raw: bool, longest: int, new: int
) -> None:
    """Refuse prompts that the model cannot take.

    Raises:
        UserError: there is no chat template, or a prompt and its answer exceed the model's longest sequence.
    """
    if not raw:
        check_chat_template(tokenizer, str(directory), "task.raw=true continues prompts without one")
    for prompt in prompts:
        if (length := len(render(prompt, tokenizer, raw=raw))) + new > longest:
            raise UserError(
                f"the prompt {prompt.last[:40]!r} has {length} tokens, which with task.max_new_tokens ({new}) is more "
                f"than the model's longest sequence ({longest}); shorten it, or lower task.max_new_tokens"
            )


def _parse_line(line: str, where: str) -> Prompt:
    message = Message(USER, check_text(line, "the prompt", where))
    return Prompt(Conversation((message,), where=where), {"prompt": line})


def _parse_row(record: Record) -> Prompt:
    row = name_prompt(record.fields, record.where)
    try:
        return Prompt(parse_prompt(row.fields, record.where), plain_json(record.fields))
    except UserError as error:
        raise row.with_original_names(error) from error


def _is_text(prompt: Prompt) -> bool:
    """Return True if the prompt is a single text that needs no chat template."""
    conversation = prompt.conversation
    has_turns = any(prompt.row.get(name) for name in (*TURNS, INSTRUCTION))
    is_single = len(conversation.messages) == 1 and conversation.messages[0].more is None and not has_turns
    return is_single and not (conversation.tools or conversation.documents or conversation.template_arguments)
