"""Record answers before and after training: ``samples.jsonl``, and a W&B table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from qwen_cl.data.chat.stop_tokens import end_of_turn_tokens
from qwen_cl.data.examples import Example
from qwen_cl.data.raw_text import document_delimiters
from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.callbacks.base import RunCallback
from qwen_cl.training.model.greedy import can_sample, continue_greedily

TEXT_PROMPT = 32
"""Tokens of a raw text that are used as a prompt."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its expected answer."""

    prompt: list[int]
    expected: list[int]
    stops: frozenset[int]


class RecordSamples(RunCallback):
    """The answers to the first prompts of the target's validation set, decoded greedily at step 0 and the end of
    training."""

    def __init__(self, output_dir: str, prompts: int, new_tokens: int) -> None:
        self.folder = RunFolder(output_dir)
        self.prompts = prompts
        self.new_tokens = new_tokens

    def on_step_zero(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not can_sample():
            print("no samples: they require cluster.context_parallel=1")
        self._take(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > 0:
            self._take(trainer)
        if self.context.wandb_logger is not None and self.folder.samples.exists():
            self.context.wandb_logger.log_table("samples", *self._table(), trainer.global_step)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return the table of the file, which includes samples from before an interruption."""
        answers: dict[int, list[dict[str, Any]]] = {}
        for line in self.folder.samples.read_text(encoding="utf-8").splitlines():
            answers.setdefault((record := json.loads(line))["step"], []).append(record)
        rows = [
            [records[0]["prompt"], records[0]["expected"], *(record["answer"] for record in records)]
            for records in zip(*answers.values())
        ]
        return ["prompt", "expected", *(f"step {step}" for step in answers)], rows

    def _take(self, trainer: pl.Trainer) -> None:
        if not can_sample():
            return
        questions = self._questions(trainer)
        ids = continue_greedily(
            trainer.strategy.megatron_parallel,
            [question.prompt for question in questions],
            self.new_tokens,
            [question.stops for question in questions],
        )
        if not trainer.is_global_zero:
            return
        tokenizer, step = trainer.datamodule.tokenizer.tokenizer, trainer.global_step
        with self.folder.samples.open("a", encoding="utf-8") as stream:
            for (prompt, expected), answer in zip(self._decoded(trainer), ids):
                line = {"step": step, "prompt": prompt, "expected": expected, "answer": _decode(tokenizer, answer)}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _questions(self, trainer: pl.Trainer) -> list[Question]:
        tokenizer = trainer.datamodule.tokenizer.tokenizer
        delimiters, ends = document_delimiters(tokenizer), end_of_turn_tokens(tokenizer)
        eos, bos = delimiters.eos_id, delimiters.bos_id if trainer.datamodule.raw_text else None
        examples = trainer.datamodule.evaluation_sets[0].examples
        return [
            question_of(examples[index], eos, self.new_tokens, bos, ends) for index in _first(examples, self.prompts)
        ]

    def _decoded(self, trainer: pl.Trainer) -> list[tuple[str, str]]:
        tokenizer = trainer.datamodule.tokenizer.tokenizer
        return [
            (_decode(tokenizer, each.prompt), _decode(tokenizer, each.expected)) for each in self._questions(trainer)
        ]


def question_of(
    example: Example, eos: int, new_tokens: int, bos: int | None = None, ends: Sequence[int] | None = None
) -> Question:
    """Return the prompt and answer of an example: a conversation up to its first answer, or the beginning of a text.

    An answer ends with one of ``ends``, by default with the last token of its loss span. ``bos`` is the tokenizer's
    start token. A packed sequence that starts in the middle of a document is prompted as a text of its own.
    """
    start, stop = example.loss_spans[0]
    between = bos is not None and example.ids[:2] == [eos, bos]  # starts with the previous document's end
    if start == 1 or between:
        ids = example.ids[1:] if between else example.ids
        if bos is not None and ids[0] != bos:
            ids = [bos, *ids]
        start = max(1, min(TEXT_PROMPT, len(ids) // 2))
        return Question(ids[:start], ids[start : start + new_tokens], frozenset({eos}))
    stops = frozenset({eos, *([example.ids[stop - 1]] if ends is None else ends)})
    end = stop - 1 if example.ids[stop - 1] in stops else stop
    return Question(example.ids[:start], example.ids[start:end], stops)


def _first(examples: Sequence[Example], count: int) -> range:
    return range(min(count, len(examples)))


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode with special tokens, as they are part of the prompt."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
