"""Conversations through the model's chat template: token ids, and which of them are answers. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_cl.config.errors import UserError
from qwen_cl.config.tasks import LossOn
from qwen_cl.data.conversations import ASSISTANT, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_conversation(
    row: Conversation, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Token ids of a whole conversation, and the half-open ranges of its answers in them.

    What is asked and what is answered are tokenised apart, as they are when the model answers.
    """
    messages = [{"role": message.role, "content": message.content} for message in row.messages]
    ids: list[int] = []
    answers: list[tuple[int, int]] = []
    done = ""
    for number, message in enumerate(row.messages):
        if message.role != ASSISTANT or (loss_on is LossOn.last_answer and number + 1 < len(messages)):
            continue
        asked = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise UserError(
                "the model's chat template renders a prompt differently once it is answered, so the answer cannot be "
                "told from the prompt; write task.loss_on=last_answer if that is so of earlier answers only, or give "
                "the tokenizer a template that does not"
            )
        answer = answered[len(asked) :].rstrip("\n")
        ids += _encode(tokenizer, asked[len(done) :])
        start = len(ids)
        ids += _encode(tokenizer, answer)
        answers.append((start, len(ids)))
        done = asked + answer
    return ids, tuple(answers)


def check_chat_template(
    tokenizer: PreTrainedTokenizerBase, directory: str, otherwise: str = "use task=pretrain"
) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"{directory}: its tokenizer has no chat template, which conversations are rendered with; "
            f"add chat_template to tokenizer_config.json, or {otherwise}"
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
