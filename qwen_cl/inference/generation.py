"""Batched generation with transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwen_cl.config.task.inference import AnswersConfig
from qwen_cl.data.chat.stop_tokens import stop_tokens
from qwen_cl.inference.prompts import Prompt, render

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to a prompt."""

    prompt: Prompt
    text: str
    tokens: int
    ended: bool
    """True if the model ended it with a stop token, False if it reached max_new_tokens."""

    def plain(self) -> dict[str, Any]:
        """Return the answer as a JSON object, with the fields of its prompt's row."""
        return {**self.prompt.row, "completion": self.text, "tokens": self.tokens, "ended": self.ended}


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    task: AnswersConfig,
    seed: int,
) -> Iterator[Answer]:
    """Yield an answer per prompt, in order. Sampling depends on the seed and on the batches."""
    torch.manual_seed(seed)
    stops = model_stop_tokens(model, tokenizer, raw=task.raw)
    # Only the stop tokens of the model's generation config are used: its repetition penalty or temperature would make
    # the comparison of models one of their recommended settings.
    model.generation_config = _generation_config(task, stops, tokenizer)
    for start in range(0, len(prompts), task.batch_size):
        batch = prompts[start : start + task.batch_size]
        yield from _answer_batch(model, tokenizer, batch, task, set(stops))


def model_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, raw: bool) -> list[int]:
    """Return the ids of the tokens that end an answer."""
    eos = model.generation_config.eos_token_id
    return stop_tokens(tokenizer, [eos] if isinstance(eos, int) else eos or [], raw=raw)


def _generation_config(task: AnswersConfig, stops: list[int], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": task.temperature, "top_p": task.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=task.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.eos_token_id,
        **(sampling if task.temperature > 0 else {"do_sample": False}),
    )


@torch.no_grad()
def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    task: AnswersConfig,
    stops: set[int],
) -> Iterator[Answer]:
    rendered = [render(prompt, tokenizer, raw=task.raw) for prompt in batch]
    longest = max(map(len, rendered))
    padding = [longest - len(ids) for ids in rendered]
    ids = torch.tensor([[tokenizer.eos_token_id] * before + row for before, row in zip(padding, rendered)])
    mask = torch.tensor([[0] * before + [1] * len(row) for before, row in zip(padding, rendered)])
    produced = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    for prompt, row in zip(batch, produced[:, longest:].tolist()):
        end = next((index for index, token in enumerate(row) if token in stops), None)
        tokens = row if end is None else row[:end]
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        yield Answer(prompt, text, len(tokens), end is not None)
