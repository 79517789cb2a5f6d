"""The forward pass of one micro batch: onto the device, and through the model to the loss of each token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_batch_on_this_cp_rank

from qwen_cl.patches.cpu_device import without_function_mode
from qwen_cl.training.model.loss import IGNORE_INDEX

Batch = dict[str, torch.Tensor]


def data_step(dataloader_iter: Iterator[Any]) -> dict[str, torch.Tensor | None]:
    """Return the tensors of a micro batch that this pipeline stage needs, on the device.

    NeMo's version requires an attention mask without Transformer Engine; attention here is always causal, and every
    stage needs the segments of a packed batch. A context parallel rank keeps its two pieces of each sequence; the
    segments stay those of whole sequences.
    """
    batch = next(dataloader_iter)
    if isinstance(batch, tuple):
        batch = batch[0]
    needed = {"segments"}
    batch = {**batch, **get_batch_on_this_cp_rank({name: batch[name] for name in batch if name != "segments"})}
    if parallel_state.is_pipeline_first_stage():
        needed |= {"tokens", "position_ids"}
    if parallel_state.is_pipeline_last_stage():
        needed |= {"labels", "loss_mask"}
    return {name: _on_device(value) if name in needed else None for name, value in batch.items()}


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy from pinned memory, as any other copy would wait for the queued work of the GPU."""
    pinned = tensor.pin_memory() if torch.cuda.is_available() and not tensor.is_cuda else tensor
    return pinned.cuda(non_blocking=True)


def forward_step(model: GPTModel, batch: Batch) -> torch.Tensor:
    """Return the loss of every token, shape (batch, sequence), on the last stage; undefined for tokens that are
    masked."""
    labels, loss_mask = batch["labels"], batch["loss_mask"]
    with without_function_mode():
        return model(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=batch.get("segments"),
            # NeMo's model accepts no mask, but Megatron's loss accepts any label outside the vocabulary.
            labels=labels if labels is None else labels.masked_fill(loss_mask == 0, IGNORE_INDEX),
        )
