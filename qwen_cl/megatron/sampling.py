"""What the model that is being trained writes, between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from qwen_cl.data.batches import padded_width
from qwen_cl.megatron.cpu import without_function_mode


def can_sample() -> bool:
    """Where every rank has the whole model and whole rows: no layer, no vocabulary and no sequence is spread."""
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    return sizes == (1, 1, 1)


@torch.no_grad()
def continue_greedily(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, stops: Sequence[frozenset[int]]
) -> list[list[int]]:
    """The likeliest token each time, at most ``new_tokens``, up to and without the first that is in the prompt's
    ``stops``. ``model`` is NeMo's MegatronParallel; where several ranks have it, each does the same.

    Every token costs a forward pass over all before it: fine for a few short answers, and it needs no cache that the
    attention of training would have to know of.
    """
    training = model.training
    model.eval()
    device = next(model[0].parameters()).device
    rows = [list(prompt) for prompt in prompts]
    going = set(range(len(rows)))
    for _ in range(new_tokens):
        if not going:
            break
        likeliest = _likeliest(model[0], rows, device)
        for row in sorted(going):
            if likeliest[row] in stops[row]:
                going.discard(row)
            else:
                rows[row].append(likeliest[row])
    model.train(training)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]


def _likeliest(chunk: Any, rows: Sequence[Sequence[int]], device: torch.device) -> list[int]:
    """The next token of each; padding at the end is seen by no token before it."""
    width = padded_width([len(row) for row in rows])
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    positions = torch.arange(width, device=device).expand(len(rows), width).contiguous()
    with without_function_mode(), torch.compiler.set_stance("force_eager"):  # rows grow with each token
        logits = chunk(input_ids=tokens, position_ids=positions, attention_mask=None)
    ends = torch.tensor([len(row) - 1 for row in rows], device=device)
    return logits[torch.arange(len(rows), device=device), ends].float().argmax(dim=-1).tolist()
