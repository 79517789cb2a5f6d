"""Prompts from the command line or a file. No torch."""

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
    conversation: Conversation
    """Ends with what is to be answered; of a raw prompt it is the only message."""
    row: dict[str, Any]
    """As it was given, for the output."""

    @property
    def last(self) -> str:
        return self.conversation.messages[-1].content


def one_prompt(text: str) -> Prompt:
    return _parse_line(text, "task.prompt")


def read_prompts(path: Path, *, raw: bool) -> list[Prompt]:
    """Files of rows, in every format that training reads, have a row each; any other file a prompt a line.

    Raises:
        UserError: names file and line of the first that is none.
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
    """Token ids; a conversation tokenized as in training, a raw text as the model's tokenizer starts texts."""
    if raw:
        return encode_start(tokenizer, prompt.last)
    return render_prompt(prompt.conversation, tokenizer)


def check_prompts(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, directory: Path, *, raw: bool, longest: int, new: int
) -> None:
    """Raises UserError where the model cannot take them: no chat template, or past its longest sequence."""
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
    """Whether the prompt is one text, with nothing that only a chat template could say."""
    conversation = prompt.conversation
    is_form = any(prompt.row.get(name) for name in (*TURNS, INSTRUCTION))
    alone = len(conversation.messages) == 1 and conversation.messages[0].more is None and not is_form
    return alone and not (conversation.tools or conversation.documents or conversation.template_arguments)
