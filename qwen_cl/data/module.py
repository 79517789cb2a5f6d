"""The data module NeMo trains from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.io.mixin import IOMixin
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from qwen_cl.data.batches import padded_width
from qwen_cl.data.examples import Example
from qwen_cl.data.mixing import Mixture
from qwen_cl.data.named_sets import ScoredSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StaticShape:
    """Of every micro batch, so that what is compiled or recorded for one serves all."""

    width: int
    """Positions of a row."""
    segments: int
    """Of a row; those that it has not are empty, at the end of the batch."""


def collate(examples: list[Example], shape: StaticShape | None = None) -> dict[str, torch.Tensor]:
    """A micro batch, padded at the end to its longest row: tensors of shape (batch, positions).

    Where a row has several segments there is ``segments`` too: their boundaries in the flattened batch, int32, from 0
    to batch x positions, as attention kernels want them (``cu_seqlens``). Padding is of the segment before it, which
    as attention is causal never sees it.
    """
    width = padded_width([example.num_positions for example in examples]) if shape is None else shape.width
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.zeros_like(tokens)
    loss_mask = torch.zeros(len(examples), width)
    boundaries = []
    for row, example in enumerate(examples):
        _fill_row(example, tokens[row], labels[row], loss_mask[row])
        boundaries += [row * width + start - number for number, start in enumerate(example.starts)]
    # A position is a distance to rotary embeddings, so those of a segment may start anywhere.
    position_ids = torch.arange(width).expand(len(examples), width).contiguous()
    batch = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
    most = len(boundaries) if shape is None else len(examples) * shape.segments
    if most > len(examples):
        ends = [tokens.numel()] * (most - len(boundaries) + 1)
        batch["segments"] = torch.tensor([*boundaries, *ends], dtype=torch.int32)
    return batch


def _fill_row(example: Example, tokens: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor) -> None:
    """The last id of a segment is a label only, so the next segment's first takes the position after it."""
    ids = torch.tensor(example.ids)
    counted = torch.zeros(len(ids))
    for start, stop in example.counted:
        counted[start:stop] = 1.0
    position = 0
    for start, stop in example.segments():
        end = position + stop - start - 1
        tokens[position:end] = ids[start : stop - 1]
        labels[position:end] = ids[start + 1 : stop]
        loss_mask[position:end] = counted[start + 1 : stop]
        position = end


@dataclass(frozen=True, slots=True)
class Sets:
    train: list[tuple[Sequence[Example], float]]
    """Each with its share of the labels."""
    evaluation: list[ScoredSet]
    """Named as their metrics are."""


class TokenDataModule(pl.LightningDataModule, IOMixin):
    """Trains and validates on token sequences. Subclasses say where the examples come from."""

    raw_text = False
    """The target is documents, rather than conversations."""

    def __init__(
        self,
        *,
        tokenizer: AutoTokenizer,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        max_steps: int,
        seed: int,
        static_shapes: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.max_steps = max_steps
        self.seed = seed
        self.static_shapes = static_shapes
        self.shape: StaticShape | None = None
        """Of the micro batches that are trained on, if it is always the same."""
        self.data_sampler = MegatronDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def build_sets(self) -> Sets:
        """What is trained on and what is measured."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        sets = self.build_sets()
        self.train_dataset = Mixture(
            [examples for examples, _ in sets.train],
            [share for _, share in sets.train],
            # A batch more than is trained on: Megatron's sampler refuses to go on where nothing is left.
            num_samples=(self.max_steps + 1) * self.global_batch_size,
            seed=self.seed,
        )
        self.evaluation_sets = sets.evaluation
        if self.static_shapes:
            most = max(_most_segments(examples) for examples, _ in sets.train)
            self.shape = StaticShape(padded_width([self.seq_length]), most)
        sizes = ", ".join(f"{scored.name} {len(scored.examples)}" for scored in sets.evaluation)
        trained = ", ".join(f"{len(examples)} ({share:.3g} of the labels)" for examples, share in sets.train)
        logger.info("Training examples: %s; to evaluate: %s", trained, sizes)

    def train_dataloader(self) -> WrappedDataLoader:
        self.data_sampler.init_global_step = self.trainer.global_step
        return WrappedDataLoader(mode="train", dataset=self.train_dataset, collate_fn=self.collate, num_workers=0)

    def collate(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        return collate(examples, self.shape)

    def state_dict(self) -> dict[str, Any]:
        consumed = self.data_sampler.compute_consumed_samples(
            self.trainer.global_step - self.data_sampler.init_global_step
        )
        return {"consumed_samples": consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        from megatron.core.num_microbatches_calculator import update_num_microbatches

        self.data_sampler.init_consumed_samples = state_dict["consumed_samples"]
        self.data_sampler.prev_consumed_samples = state_dict["consumed_samples"]
        self.data_sampler.if_first_step = 1
        update_num_microbatches(consumed_samples=state_dict["consumed_samples"], consistency_check=False)


def _most_segments(examples: Sequence[Example]) -> int:
    """Of one example; those of a corpus, which are no list, are one stretch of text each."""
    return max(len(example.starts) for example in examples) if isinstance(examples, list) else 1
