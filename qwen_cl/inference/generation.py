"""Answers by transformers' generate, in batches."""

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
    prompt: Prompt
    text: str
    tokens: int
    ended: bool
    """The model ended it; else it was cut at max_new_tokens."""

    def plain(self) -> dict[str, Any]:
        return {**self.prompt.row, "completion": self.text, "tokens": self.tokens, "ended": self.ended}


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    task: AnswersConfig,
    seed: int,
) -> Iterator[Answer]:
    """In the order of the prompts. What is drawn depends on the seed and the batches."""
    torch.manual_seed(seed)
    stops = stops_of(model, tokenizer, raw=task.raw)
    # Of the model's own generation config only the stops count: repetition penalties and the like would compare
    # models by what their makers recommend.
    model.generation_config = _generation_config(task, stops, tokenizer)
    for start in range(0, len(prompts), task.batch_size):
        batch = prompts[start : start + task.batch_size]
        yield from _answer_batch(model, tokenizer, batch, task, set(stops))


def stops_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, raw: bool) -> list[int]:
    named = model.generation_config.eos_token_id
    return stop_tokens(tokenizer, [named] if isinstance(named, int) else named or [], raw=raw)


def _generation_config(task: AnswersConfig, stops: list[int], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    from transformers import GenerationConfig

    drawn = {"do_sample": True, "temperature": task.temperature, "top_p": task.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=task.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.eos_token_id,
        **(drawn if task.temperature > 0 else {"do_sample": False}),
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
        kept = row if end is None else row[:end]
        text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        yield Answer(prompt, text, len(kept), end is not None)
