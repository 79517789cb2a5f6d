"""Prompts from the command line or a file. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.chat import check_chat_template
from qwen_cl.data.conversations import ASSISTANT, USER, Message, check_text, parse_messages
from qwen_cl.data.lines import numbered_lines, parse_object
from qwen_cl.data.raw_text import encode_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prompt:
    messages: tuple[Message, ...]
    """Ends with the user's; of a raw prompt it is the only one."""
    row: dict[str, Any]
    """As it was given, for the output."""

    @property
    def last(self) -> str:
        return self.messages[-1].content


def one_prompt(text: str) -> Prompt:
    return Prompt((Message(USER, check_text(text, "the prompt", "task.prompt")),), {"prompt": text})


def read_prompts(path: Path, *, raw: bool) -> list[Prompt]:
    """A ``.jsonl`` file has an object a line, any other file a prompt a line.

    Raises:
        UserError: names file and line of the first that is none.
    """
    parse = _parse_row if path.suffix == ".jsonl" else _parse_line
    prompts = [parse(line, where) for line, where in numbered_lines(path, "task.prompts")]
    if raw and (several := next((prompt for prompt in prompts if "messages" in prompt.row), None)):
        shown = json.dumps(several.row, ensure_ascii=False)[:60]
        raise UserError(f"{path}: task.raw=true continues texts, and {shown} is a conversation; write prompt instead")
    return prompts


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, raw: bool) -> list[int]:
    """Token ids; a conversation tokenised as in training, a raw text as the model's tokenizer starts texts."""
    if raw:
        return encode_start(tokenizer, prompt.last)
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
    text = check_text(line, "the prompt", where)
    return Prompt((Message(USER, text),), {"prompt": text})


def _parse_row(line: str, where: str) -> Prompt:
    row = parse_object(line, where, "prompt or messages")
    if "prompt" in row:
        return Prompt((Message(USER, check_text(row["prompt"], "field 'prompt'", where)),), row)
    if "messages" not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{where}: field 'prompt' or 'messages' is missing (found: {found})")
    messages = parse_messages(row, where)
    if messages[-1].role == ASSISTANT:
        raise UserError(f"{where}: messages ends with an answer, which leaves nothing to answer; cut it")
    return Prompt(messages, row)
