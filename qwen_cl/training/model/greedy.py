"""Decode greedily with the model in training, between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from qwen_cl.data.batching import padded_width
from qwen_cl.patches.cpu_device import without_function_mode


def can_sample() -> bool:
    """Return whether each rank has whole sequences, which decoding needs."""
    return bool(parallel_state.get_context_parallel_world_size() == 1)


@torch.no_grad()
def continue_greedily(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, stops: Sequence[frozenset[int]]
) -> list[list[int]]:
    """Return the greedy continuation of each prompt: at most ``new_tokens``, up to the first of its ``stops``.

    The result is the same on every rank, and every rank must call. ``model`` is NeMo's MegatronParallel.

    Each token costs a full forward pass: fast enough for a few short answers, and it needs no KV cache in the training
    attention.
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
    """Return the most likely next token of each sequence. Padding at the end does not affect earlier tokens."""
    width, device = padded_width([len(row) for row in rows]), torch.cuda.current_device()
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    positions = torch.arange(width, device=device).expand(len(rows), width).contiguous()
    ends = torch.tensor([len(row) - 1 for row in rows], device=device)
    each = torch.arange(len(rows), device=device)

    def step(batches: Any, chunk: torch.nn.Module) -> Any:
        with without_function_mode():
            logits = chunk(input_ids=tokens, position_ids=positions, attention_mask=None)
        return logits, lambda logits, non_loss_data: _best_of_all_parts(logits[each, ends])

    with torch.compiler.set_stance("force_eager"):  # sequences grow with each token
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
    found = outputs[0] if outputs else torch.full_like(ends, -1)  # only the last pipeline stage has outputs
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return found.tolist()


def _best_of_all_parts(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of each row's largest logit in the whole vocabulary, the first of several.

    Shape: (rows, this rank's part of the vocabulary).
    """
    group, size = parallel_state.get_tensor_model_parallel_group(), logits.shape[1]
    best, place = logits.float().max(dim=-1)
    bests = best.new_empty(group.size() * len(best))
    places = place.new_empty(group.size() * len(best))
    torch.distributed.all_gather_into_tensor(bests, best, group=group)
    torch.distributed.all_gather_into_tensor(places, place + group.rank() * size, group=group)
    part = bests.view(group.size(), -1).argmax(dim=0)
    return places.view(group.size(), -1)[part, torch.arange(len(best), device=part.device)]
