"""The losses of a run's sets in transformers, one sequence at a time, without the code under test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@dataclass(frozen=True, slots=True)
class Reference:
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, directory: Path) -> Reference:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        return cls(model, AutoTokenizer.from_pretrained(directory))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text_sequences(self, texts: Iterable[str], length: int) -> list[list[int]]:
        """Return sequences of ``length`` labels, with an end-of-text before the first text and after each."""
        eos = self.tokenizer.eos_token_id
        stream = [eos]
        for text in texts:
            stream += [*self.ids(text), eos]
        return [stream[start : start + length + 1] for start in range(0, len(stream) - 1, length)]

    def chat_sequences(self, rows: Iterable[dict[str, str]], length: int) -> list[list[int]]:
        """Return sequences of prompts and completions in the format of the tests' tokenizer."""
        sequences = []
        for row in rows:
            prompt = f"{SYSTEM}<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            ids = [*self.ids(prompt), *self.ids(f"{row['completion']}<|im_end|>")]
            sequences.append(ids[: length + 1])
        return sequences

    @torch.no_grad()
    def nats(self, sequences: Sequence[list[int]]) -> tuple[float, int]:
        """Return the loss over all ids but the first of each sequence, and their number."""
        total, count = 0.0, 0
        for sequence in sequences:
            ids = torch.tensor([sequence])
            total += float(self.model(ids, labels=ids).loss) * (len(sequence) - 1)
            count += len(sequence) - 1
        return total, count

    def loss(self, sequences: Sequence[list[int]]) -> float:
        total, count = self.nats(sequences)
        return total / count

    def bits_per_byte(self, sequences: Sequence[list[int]], num_bytes: int) -> float:
        return self.nats(sequences)[0] / math.log(2) / num_bytes
