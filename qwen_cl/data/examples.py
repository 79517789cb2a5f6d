"""From rows to token sequences with a mask of what counts. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_cl.config.errors import UserError
from qwen_cl.data.rows import Instruction, Row, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Example:
    ids: list[int]
    """One more than the positions trained on: each id but the first is somebody's label."""
    first_label: int
    """Index in ``ids`` from which labels count; at or past the end, none does."""

    @property
    def num_labels(self) -> int:
        return max(0, len(self.ids) - max(1, self.first_label))


def build_examples(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Iterator[Example]:
    """Instructions become one example each; texts are joined by the end-of-text token and cut to full length."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    everything = itertools.chain([first], rows)
    if isinstance(first, Text):
        yield from _pack(everything, tokenizer, sequence_length)
    else:
        yield from (_instruction(row, tokenizer, sequence_length) for row in everything)


def check_examples(rows: list[Row], tokenizer: PreTrainedTokenizerBase, sequence_length: int, path: str) -> None:
    """Refuse rows of which nothing would be learnt: every answer lies past the cut.

    Stops at the first example with a label, so good data costs nothing.
    """
    if not any(example.num_labels for example in build_examples(rows, tokenizer, sequence_length)):
        raise UserError(
            f"{path}: no row has a label within task.sequence_length ({sequence_length}): every prompt alone is "
            "longer; raise task.sequence_length or shorten the prompts"
        )


def _instruction(row: Row, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Example:
    """Prompt and answer are tokenised apart, as they are when the model answers."""
    assert isinstance(row, Instruction)
    question = [{"role": "user", "content": row.prompt}]
    answered = [*question, {"role": "assistant", "content": row.completion}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    if not whole.startswith(prompt):
        raise UserError(
            "the model's chat template renders a prompt differently once it is answered, so the answer cannot be "
            "told from the prompt; use another model or give its tokenizer a template that does not"
        )
    ids = _encode(tokenizer, prompt)
    first_label = len(ids)
    ids += _encode(tokenizer, whole[len(prompt) :].rstrip("\n"))
    return Example(ids[: sequence_length + 1], first_label)


def _pack(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Iterator[Example]:
    """Consecutive sequences share one token, so that every token but the first is a label once."""
    buffer: list[int] = []
    for row in rows:
        assert isinstance(row, Text)
        buffer += [*_encode(tokenizer, row.text), tokenizer.eos_token_id]
        while len(buffer) > sequence_length:
            yield Example(buffer[: sequence_length + 1], 1)
            buffer = buffer[sequence_length:]
    if len(buffer) > 1:
        yield Example(buffer, 1)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, from its files alone.

    Raises:
        UserError: the directory has none, or it has no chat template or end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{directory} has no tokenizer that loads ({str(error).splitlines()[0]}); "
            "copy tokenizer.json and tokenizer_config.json beside config.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: its tokenizer names no eos_token; set it in tokenizer_config.json")
    return tokenizer


def check_chat_template(tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"{directory}: its tokenizer has no chat template, which task=finetune renders prompts with; "
            "add chat_template to tokenizer_config.json, or use task=pretrain"
        )
