"""Initialize adapters as a function of the run's seed and the adapter's name, independent of the layout.

NeMo draws each from its rank's generator, so that every pipeline stage draws the same numbers for different layers, and
a tensor parallel rank on a GPU scales them by its part of the matrix.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from nemo.lightning.pytorch.callbacks.peft import PEFT

from qwen_cl.models.adapter_methods import ADAPTER, DOWN
from qwen_cl.models.loading.megatron_shards import layer_of, local_shards
from qwen_cl.patches.registry import replace

DRAWN = f"{ADAPTER}{DOWN.nemo}"
"""linear_out starts with zeros, and DoRA's magnitudes follow from the frozen weights."""

_seeds: list[int] = []
_stock_set_params_to_save = PEFT.set_params_to_save


def set_adapter_seed(seed: int) -> None:
    """Set the seed of the next adapters that are created in this process."""
    _seeds[:] = [seed]


def install() -> None:
    """Initialize adapters right after NeMo creates them, before those of a checkpoint are loaded."""
    replace(PEFT, "set_params_to_save", _draw_and_set)


def _draw_and_set(self: PEFT, trainer: Any) -> None:
    if _seeds and getattr(self, "lora_A_init_method", None) == "xavier":
        init_adapters(trainer.strategy.megatron_parallel, _seeds[0])
    _stock_set_params_to_save(self, trainer)


@torch.no_grad()
def init_adapters(model: Any, seed: int) -> int:
    """Draw each whole matrix from NeMo's distribution (``xavier_normal_``), of which each rank takes its part.

    Returns the number of matrices.
    """
    shards = [shard for shard in local_shards(model.sharded_state_dict()) if shard.key.endswith(DRAWN)]
    for shard in shards:
        name = f"{seed} {shard.key} {layer_of(shard)}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        shape, offset = (each[shard.prepend_axis_num :] for each in (shard.global_shape, shard.global_offset))
        values = torch.nn.init.xavier_normal_(torch.empty(shape), generator=generator)
        part = tuple(slice(start, start + size) for start, size in zip(offset, shard.data.shape))
        shard.data.copy_(values[part])
    return len(shards)
