"""Compute the loss of a global batch: the mean over its loss tokens, with the padded vocabulary masked.

The losses of single tokens come from Megatron's model (step.py), or from speed/fused_linear_cross_entropy.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

IGNORE_INDEX = -100
"""The label of a token without a loss, as everywhere in PyTorch."""


class TokenWeightedLoss(MaskedTokenLossReduction):
    """The mean over the loss tokens of a global batch; NeMo averages the means of its micro batches."""

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        if not losses_reduced_per_micro_batch:
            return torch.tensor(0.0, device=torch.cuda.current_device())  # not the last pipeline stage
        sums = torch.stack([output["loss_sum_and_ub_size"] for output in losses_reduced_per_micro_batch]).sum(dim=0)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return sums[0] / sums[1].clamp(min=1)


def mask_padded_vocabulary(model: torch.nn.Module, vocab_size: int) -> None:
    """Exclude the rows that pad the vocabulary from the softmax, where a logit of zero would count.

    Has no effect on stages without an output layer and on ranks whose slice has no padding. Output layers get the
    attribute ``vocabulary_rows``, the number of their rows that are tokens.
    """
    for module in model.modules():
        if not isinstance(module, GPTModel) or not module.post_process:
            continue
        rows = module.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        first = rows * parallel_state.get_tensor_model_parallel_rank()
        valid = max(0, min(rows, vocab_size - first))
        module.output_layer.vocabulary_rows = valid
        if valid < rows:
            module.output_layer.register_forward_hook(_masking_hook(valid))


def _masking_hook(valid: int) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        padding = torch.arange(logits.shape[-1], device=logits.device) >= valid
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias

    return hook
