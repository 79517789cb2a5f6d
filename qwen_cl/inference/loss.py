"""The loss of a set: a sum over the tokens that count, whatever batch they came in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwen_cl.data.batching import longest_first
from qwen_cl.data.eval_sets import ScoredSet
from qwen_cl.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = 1024
"""Whose logits are in memory at a time: a vocabulary of 150,000 in fp32 takes 0.6 GB for these."""


@dataclass(frozen=True, slots=True)
class SetLoss:
    rows: int
    tokens: int
    """That count."""
    num_bytes: int
    """See ScoredSet."""
    loss: float
    """Nats per token, mean over the tokens."""
    perplexity: float
    bits_per_byte: float
    """The same sum in bits, per byte of the text: comparable between tokenizers."""

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def set_loss(model: PreTrainedModel, scored: ScoredSet, batch_size: int) -> SetLoss:
    total, tokens = sum_losses(model, scored.examples, batch_size)
    loss = total / tokens
    bits = total / math.log(2) / scored.num_bytes if scored.num_bytes else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return SetLoss(scored.rows, tokens, scored.num_bytes, loss, perplexity, bits)


@torch.no_grad()
def sum_losses(model: PreTrainedModel, examples: Sequence[Example], batch_size: int) -> tuple[float, int]:
    """Nats of all counted tokens, and their number."""
    total, tokens = 0.0, 0
    for batch in longest_first(examples, batch_size):
        ids, counted = _padded(batch)
        ids, counted = ids.to(model.device), counted.to(model.device)
        # Padding comes after what it pads, and attention is causal: no mask is needed.
        hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[counted[:, 1:]]
        labels = ids[:, 1:][counted[:, 1:]]
        for part, wanted in zip(torch.split(hidden, POSITIONS), torch.split(labels, POSITIONS)):
            logits = model.get_output_embeddings()(part).float()
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double().sum())
        tokens += len(labels)
    return total, tokens


def _padded(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and which of them count as labels; of shape (batch, longest)."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    counted = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        for start, stop in example.loss_spans:
            counted[row, start:stop] = True
    return ids, counted
