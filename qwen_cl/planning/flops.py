"""Floating-point operations of training, from which model FLOPs utilization (MFU) is computed.

As in PaLM (arXiv 2204.02311, appendix B), with two refinements: attention is counted for the pairs of tokens that
attend, which is half of the square or less with packing, and frozen weights have no weight gradient. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.models.architecture import Architecture

PEAK = {"H200": 989.4e12, "H100 NVL": 835.5e12, "H100 PCIe": 756.5e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 operations per second by a part of the device's name, from NVIDIA's data sheets (without sparsity)."""


@dataclass(frozen=True, slots=True)
class TrainingFlops:
    """The operations of a forward and backward pass."""

    per_token: float
    per_pair: float
    """Operations per pair of tokens where one attends to the other, or to itself."""

    def of(self, tokens: int, pairs: int) -> float:
        return self.per_token * tokens + self.per_pair * pairs


def training_flops(architecture: Architecture, adapter: int | None) -> TrainingFlops:
    """Return the operations of training with ``adapter`` parameters; None is full fine-tuning.

    A matmul takes two operations per weight and token, as do its input gradient and its weight gradient. Embedding
    lookup takes none.
    """
    query = architecture.query_size
    attention = architecture.hidden_size * (2 * query + 2 * architecture.key_value_size)
    layer = attention + 3 * architecture.hidden_size * architecture.ffn_hidden_size
    weights = architecture.num_layers * layer + architecture.vocab_size * architecture.hidden_size
    per_token = 6 * weights if adapter is None else 4 * weights + 6 * adapter
    # Scores and their matmul with the values: two matmuls of query_size; both inputs of each have gradients.
    return TrainingFlops(per_token=per_token, per_pair=3 * 2 * 2 * query * architecture.num_layers)


def peak_flops(device: str) -> float | None:
    """Return the peak bf16 operations per second of a device; None if unknown."""
    return next((peak for name, peak in PEAK.items() if name in device), None)
