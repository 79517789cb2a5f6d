"""What one micro batch goes through: onto the device, through the model, into a loss that counts tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_batch_on_this_cp_rank
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from qwen_cl.patches.cpu_device import without_function_mode

Batch = dict[str, torch.Tensor]
IGNORE_INDEX = -100
"""The label of a token whose loss is not counted, as everywhere in PyTorch."""


def data_step(dataloader_iter: Iterator[Any]) -> dict[str, torch.Tensor | None]:
    """Keep what this pipeline stage needs. NeMo's own version insists on an attention mask without Transformer
    Engine; attention here is causal by construction, and every stage needs the segments of a packed batch. Of each row,
    a context parallel rank keeps its two pieces; segments stay those of whole rows."""
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
    """From pinned memory, else the copy would wait for all that the GPU has to do before it."""
    pinned = tensor.pin_memory() if torch.cuda.is_available() and not tensor.is_cuda else tensor
    return pinned.cuda(non_blocking=True)


def forward_step(model: GPTModel, batch: Batch) -> torch.Tensor:
    """Loss of every token, shape (batch, sequence), on the last stage; of those that do not count it means nothing."""
    labels, counted = batch["labels"], batch["loss_mask"]
    with without_function_mode():
        return model(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=batch.get("segments"),
            # NeMo's model takes no mask; Megatron's loss takes any label outside the vocabulary.
            labels=labels if labels is None else labels.masked_fill(counted == 0, IGNORE_INDEX),
        )


class TokenWeightedLoss(MaskedTokenLossReduction):
    """NeMo's reduction over a global batch, by tokens; NeMo's own averages the means of its micro batches."""

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        if not losses_reduced_per_micro_batch:
            return torch.tensor(0.0, device=torch.cuda.current_device())  # not the last pipeline stage
        sums = torch.stack([output["loss_sum_and_ub_size"] for output in losses_reduced_per_micro_batch]).sum(dim=0)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return sums[0] / sums[1].clamp(min=1)


def mask_padded_vocabulary(model: torch.nn.Module, vocab_size: int) -> None:
    """Keep rows that only pad the vocabulary out of the softmax; a zero logit is not a small one.

    Changes nothing on the stages without an output layer and on ranks whose slice holds no padding. Output layers say
    as ``kept_rows`` how many of their rows are tokens.
    """
    for module in model.modules():
        if not isinstance(module, GPTModel) or not module.post_process:
            continue
        rows = module.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        first = rows * parallel_state.get_tensor_model_parallel_rank()
        kept = max(0, min(rows, vocab_size - first))
        module.output_layer.kept_rows = kept
        if kept < rows:
            module.output_layer.register_forward_hook(_masking_hook(kept))


def _masking_hook(kept: int) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        padding = torch.arange(logits.shape[-1], device=logits.device) >= kept
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias

    return hook
