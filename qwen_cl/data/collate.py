"""Collation of examples into the tensors of a micro batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen_cl.data.batching import padded_width
from qwen_cl.data.examples import Example


@dataclass(frozen=True, slots=True)
class StaticShape:
    """The shape shared by all micro batches, so that a compiled graph or captured CUDA graph serves them all."""

    width: int
    """Positions per sequence."""
    segments: int
    """Segments per sequence; missing ones are empty, at the end of the batch."""


def collate(examples: list[Example], shape: StaticShape | None = None) -> dict[str, torch.Tensor]:
    """Return a micro batch, right-padded to its longest example: tensors of shape (batch, positions).

    If an example has several segments, ``segments`` holds their boundaries in the flattened batch: int32, from 0 to
    batch x positions, as attention kernels take them (``cu_seqlens``). Padding belongs to the segment before it, which
    never attends to it, as attention is causal.
    """
    width = padded_width([example.num_positions for example in examples]) if shape is None else shape.width
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.zeros_like(tokens)
    loss_mask = torch.zeros(len(examples), width)
    boundaries = []
    for row, example in enumerate(examples):
        _fill_row(example, tokens[row], labels[row], loss_mask[row])
        boundaries += [row * width + start - number for number, start in enumerate(example.starts)]
    # Rotary embeddings depend on relative positions only, so those of a segment may start anywhere.
    position_ids = torch.arange(width).expand(len(examples), width).contiguous()
    batch = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
    most = len(boundaries) if shape is None else len(examples) * shape.segments
    if most > len(examples):
        ends = [tokens.numel()] * (most - len(boundaries) + 1)
        batch["segments"] = torch.tensor([*boundaries, *ends], dtype=torch.int32)
    return batch


def _fill_row(example: Example, tokens: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor) -> None:
    """Fill one row. The last id of a segment is a label only, so each segment has one position less than ids."""
    ids = torch.tensor(example.ids)
    in_loss = torch.zeros(len(ids))
    for start, stop in example.loss_spans:
        in_loss[start:stop] = 1.0
    position = 0
    for start, stop in example.segments():
        end = position + stop - start - 1
        tokens[position:end] = ids[start : stop - 1]
        labels[position:end] = ids[start + 1 : stop]
        loss_mask[position:end] = in_loss[start + 1 : stop]
        position = end
