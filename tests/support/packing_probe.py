"""The losses and gradients of a few conversations in Megatron, packed and one per row.

Run by ``tests.support.ranks``. The cases:

- alone: one example to a row, no padding beyond the longest
- packed: the same in two rows of several segments
- changed: packed, with another text in the second segment of the first row
- filled: packed, to a width and a number of segments that all batches could have
- leaking: packed, with attention over the whole row: what the others would be if segments were ignored
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen_cl.data.examples import Example
from qwen_cl.data.packing import pack_examples

CAPACITY = 96
LENGTHS = (40, 17, 33, 3, 65, 29)


def probe_examples() -> list[Example]:
    """Return examples of random ids, in which the first id and one in the middle are not loss tokens."""
    random = np.random.default_rng(5)
    examples = []
    for length in LENGTHS:
        ids = random.integers(0, 1400, length).tolist()
        middle = length // 2
        counted = tuple(part for part in ((1, middle), (middle + 1, length)) if part[0] < part[1])
        examples.append(Example(ids, counted))
    return examples


def packed_examples() -> list[Example]:
    return pack_examples(probe_examples(), CAPACITY)


def changed_examples() -> list[Example]:
    first, *others = packed_examples()
    start, stop = list(first.segments())[1]
    ids = [*first.ids[:start], *((token + 700) % 1400 for token in first.ids[start:stop]), *first.ids[stop:]]
    return [replace(first, ids=ids), *others]


def main(out: Path, directory: Path) -> None:
    from tests.support.layout_probe import build_model, run_config

    config = run_config("model=local", f"model.source='{directory}'", "task.sequence_length=128")
    from qwen_cl.planning.plan import make_plan
    from qwen_cl.training.worker import prepare

    plan = make_plan(config)
    prepare(plan.config)
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from safetensors.torch import save_file

    from qwen_cl.data.collate import StaticShape, collate
    from qwen_cl.models.formats.safetensors import Checkpoint
    from qwen_cl.models.loading.megatron_shards import fill

    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    model_parallel_cuda_manual_seed(1)
    model = build_model(plan)
    fill(model.sharded_state_dict(), model.named_parameters(), Checkpoint(directory), plan.architecture)
    model.train()
    alone, packed, changed = (collate(make()) for make in (probe_examples, packed_examples, changed_examples))
    leaking = {name: value for name, value in packed.items() if name != "segments"}
    filled = collate(packed_examples(), StaticShape(width=packed["tokens"].shape[1] + 16, segments=5))
    results: dict[str, torch.Tensor] = {}
    cases = {"alone": alone, "packed": packed, "changed": changed, "leaking": leaking, "filled": filled}
    for case, batch in cases.items():
        results |= _losses_and_gradients(case, model, batch)
    save_file(results, str(out))


def _losses_and_gradients(case: str, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return losses and gradients, computed by the steps of training."""
    from qwen_cl.training.model.step import data_step, forward_step

    for parameter in model.parameters():
        parameter.grad = None
    needed: Any = data_step(iter([batch]))
    losses = forward_step(model, needed) * batch["loss_mask"]
    losses.sum().backward()
    gradients = {f"{case}.gradient.{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {f"{case}.losses": losses.detach().contiguous(), **gradients}
