"""Evaluate the loss of a set during training, between two steps, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from qwen_cl.data.batching import longest_first
from qwen_cl.data.collate import collate
from qwen_cl.data.examples import Example
from qwen_cl.launch import heartbeat
from qwen_cl.training.model.step import data_step, forward_step

BATCHES_AT_ONCE = 16


@torch.no_grad()
def sum_losses(model: Any, examples: Sequence[Example], micro_batch_size: int) -> tuple[float, int]:
    """Return the sum of the losses in nats and the number of loss tokens, the same on every rank.

    ``model`` is NeMo's MegatronParallel.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    batches = _local_share(list(longest_first(examples, micro_batch_size)))
    for start in range(0, len(batches), BATCHES_AT_ONCE):
        heartbeat.progress()
        some = [collate(batch) for batch in batches[start : start + BATCHES_AT_ONCE]]
        for loss in _losses(model, some):  # only on the last pipeline stage
            sums[0] += loss
        if parallel_state.get_context_parallel_rank() == 0:  # the others have the same examples
            sums[1] += sum(float(batch["loss_mask"].sum()) for batch in some)
    model.train(training)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(sums, op=torch.distributed.ReduceOp.MAX)  # from the last stage to the others
    return float(sums[0]), int(sums[1])


def _local_share(batches: list[list[Example]]) -> list[list[Example]]:
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return batches[rank::size]


def _losses(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Return the losses of the batches, not compiled: examples of every length could each cause a compilation."""

    def step(iterator: Any, chunk: torch.nn.Module) -> Any:
        needed: Any = data_step(iterator)

        def total(losses: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            return (losses.float() * needed["loss_mask"]).sum()

        return forward_step(chunk, needed), total

    with torch.compiler.set_stance("force_eager"):
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches) if len(model) == 1 else [iter(batches) for _ in model],
            model=list(model),
            num_microbatches=len(batches),
            seq_length=batches[0]["tokens"].shape[1],
            micro_batch_size=len(batches[0]["tokens"]),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return list(outputs)
