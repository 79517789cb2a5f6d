"""What adapters begin with: a function of the run's seed and of which adapter it is, not of the layout.

NeMo draws each from its rank's generator, so that every pipeline stage draws the same numbers for other layers, and a
tensor parallel rank on a GPU scales them by its part of the matrix.
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
"""linear_out begins with zeros, and DoRA's magnitudes follow from the frozen weights."""

_seeds: list[int] = []
_stock_set_params_to_save = PEFT.set_params_to_save


def draw_from(seed: int) -> None:
    """For the next adapters that are made in this process."""
    _seeds[:] = [seed]


def install() -> None:
    """Draw adapters when NeMo has just made them, before a checkpoint's are read over them."""
    replace(PEFT, "set_params_to_save", _draw_and_set)


def _draw_and_set(self: PEFT, trainer: Any) -> None:
    if _seeds and getattr(self, "lora_A_init_method", None) == "xavier":
        init_adapters(trainer.strategy.megatron_parallel, _seeds[0])
    _stock_set_params_to_save(self, trainer)


@torch.no_grad()
def init_adapters(model: Any, seed: int) -> int:
    """NeMo's own distribution, of the whole matrix (``xavier_normal_``); each rank takes its part. Returns how many."""
    shards = [shard for shard in local_shards(model.sharded_state_dict()) if shard.key.endswith(DRAWN)]
    for shard in shards:
        name = f"{seed} {shard.key} {layer_of(shard)}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        shape, offset = (whole[shard.prepend_axis_num :] for whole in (shard.global_shape, shard.global_offset))
        values = torch.nn.init.xavier_normal_(torch.empty(shape), generator=generator)
        part = tuple(slice(start, start + size) for start, size in zip(offset, shard.data.shape))
        shard.data.copy_(values[part])
    return len(shards)
