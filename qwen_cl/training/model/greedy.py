"""What the model that is being trained writes, between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from qwen_cl.data.batching import padded_width
from qwen_cl.patches.cpu_device import without_function_mode


def can_sample() -> bool:
    """Where rows are whole: the context of each token is on the rank that computes it."""
    return bool(parallel_state.get_context_parallel_world_size() == 1)


@torch.no_grad()
def continue_greedily(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, stops: Sequence[frozenset[int]]
) -> list[list[int]]:
    """The likeliest token each time, at most ``new_tokens``, up to and without the first that is in the prompt's
    ``stops``; the same on every rank, each of which calls this. ``model`` is NeMo's MegatronParallel.

    Every token costs a forward pass over all before it: fine for a few short answers, and it needs no cache that the
    attention of training would have to know of.
    """
    training = model.training
    model.eval()
    rows = [list(prompt) for prompt in prompts]
    going = set(range(len(rows)))
    for _ in range(new_tokens):
        if not going:
            break
        likeliest = _likeliest(model, rows)
        for row in sorted(going):
            if likeliest[row] in stops[row]:
                going.discard(row)
            else:
                rows[row].append(likeliest[row])
    model.train(training)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]


def _likeliest(model: Any, rows: Sequence[Sequence[int]]) -> list[int]:
    """The next token of each; padding at the end is seen by no token before it."""
    width, device = padded_width([len(row) for row in rows]), torch.cuda.current_device()
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    positions = torch.arange(width, device=device).expand(len(rows), width).contiguous()
    ends = torch.tensor([len(row) - 1 for row in rows], device=device)
    each = torch.arange(len(rows), device=device)

    def step(batches: Any, chunk: torch.nn.Module) -> Any:
        with without_function_mode():
            logits = chunk(input_ids=tokens, position_ids=positions, attention_mask=None)
        return logits, lambda logits, non_loss_data: _best_of_all_parts(logits[each, ends])

    with torch.compiler.set_stance("force_eager"):  # rows grow with each token
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None if len(model) == 1 else [None] * len(model),
            model=list(model),
            num_microbatches=1,
            seq_length=width,
            micro_batch_size=len(rows),
            forward_only=True,
            collect_non_loss_data=True,
        )
    found = outputs[0] if outputs else torch.full_like(ends, -1)  # none but on the last pipeline stage
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return found.tolist()


def _best_of_all_parts(logits: torch.Tensor) -> torch.Tensor:
    """Of each row the place of its largest logit, the first of several, in the whole vocabulary. Shape: (rows, this
    rank's part of the vocabulary)."""
    group, size = parallel_state.get_tensor_model_parallel_group(), logits.shape[1]
    best, place = logits.float().max(dim=-1)
    bests = best.new_empty(group.size() * len(best))
    places = place.new_empty(group.size() * len(best))
    torch.distributed.all_gather_into_tensor(bests, best, group=group)
    torch.distributed.all_gather_into_tensor(places, place + group.rank() * size, group=group)
    part = bests.view(group.size(), -1).argmax(dim=0)
    return places.view(group.size(), -1)[part, torch.arange(len(best), device=part.device)]
