"""Floating-point operations that training needs, whatever it really does: what a model's utilisation is counted from.

As in PaLM (arXiv 2204.02311, appendix B), with two refinements: attention is counted for the pairs of tokens that
attend, which is half of a square and less where conversations share a sequence, and weights that are not trained have
no gradient of their own. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.models.architecture import Architecture

PEAK = {"H200": 989.4e12, "H100 NVL": 835.5e12, "H100 PCIe": 756.5e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 operations per second by a part of the device's name, from NVIDIA's data sheets (without sparsity)."""


@dataclass(frozen=True, slots=True)
class TrainingFlops:
    """Forward and backward."""

    per_token: float
    per_pair: float
    """Of tokens of which one attends to the other, or to itself."""

    def of(self, tokens: int, pairs: int) -> float:
        return self.per_token * tokens + self.per_pair * pairs


def training_flops(architecture: Architecture, adapter: int | None) -> TrainingFlops:
    """``adapter`` is the number of its parameters: None where every weight is trained.

    A product with a matrix takes two operations per weight and token, its gradient for the input as many, and that for
    the weight as many again. Looking a token up in the embedding takes none.
    """
    query = architecture.query_size
    attention = architecture.hidden_size * (2 * query + 2 * architecture.key_value_size)
    layer = attention + 3 * architecture.hidden_size * architecture.ffn_hidden_size
    weights = architecture.num_layers * layer + architecture.vocab_size * architecture.hidden_size
    per_token = 6 * weights if adapter is None else 4 * weights + 6 * adapter
    # Scores and their product with the values: two products of query_size; both inputs of each have gradients.
    return TrainingFlops(per_token=per_token, per_pair=3 * 2 * 2 * query * architecture.num_layers)


def peak_flops(device: str) -> float | None:
    """None for a device whose data sheet is not known here."""
    return next((peak for name, peak in PEAK.items() if name in device), None)
