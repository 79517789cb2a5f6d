"""The loss of an evaluation set: the sum over its loss tokens, which does not depend on the batches."""

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
"""The number of positions whose logits are in memory at a time: 0.6 GB in fp32 for a vocabulary of 150,000."""


@dataclass(frozen=True, slots=True)
class SetLoss:
    """The loss of one evaluation set."""

    rows: int
    tokens: int
    """Loss tokens."""
    num_bytes: int
    """Bytes of the scored text (see ScoredSet)."""
    loss: float
    """Nats per token, mean over the loss tokens."""
    perplexity: float
    bits_per_byte: float
    """Total loss in bits per byte of text, which is comparable between tokenizers."""

    def plain(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


def set_loss(model: PreTrainedModel, scored: ScoredSet, batch_size: int) -> SetLoss:
    """Compute the loss of a set."""
    total, tokens = sum_losses(model, scored.examples, batch_size)
    loss = total / tokens
    bits = total / math.log(2) / scored.num_bytes if scored.num_bytes else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return SetLoss(scored.rows, tokens, scored.num_bytes, loss, perplexity, bits)


@torch.no_grad()
def sum_losses(model: PreTrainedModel, examples: Sequence[Example], batch_size: int) -> tuple[float, int]:
    """Return the total loss in nats of all loss tokens, and their number."""
    total, tokens = 0.0, 0
    for batch in longest_first(examples, batch_size):
        ids, loss_mask = _padded(batch)
        ids, loss_mask = ids.to(model.device), loss_mask.to(model.device)
        # Padding is on the right and attention is causal, so no attention mask is needed.
        hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[loss_mask[:, 1:]]
        labels = ids[:, 1:][loss_mask[:, 1:]]
        for states, targets in zip(torch.split(hidden, POSITIONS), torch.split(labels, POSITIONS)):
            logits = model.get_output_embeddings()(states).float()
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum())
        tokens += len(labels)
    return total, tokens


def _padded(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and the loss mask, both of shape (batch, longest)."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    loss_mask = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        for start, stop in example.loss_spans:
            loss_mask[row, start:stop] = True
    return ids, loss_mask
