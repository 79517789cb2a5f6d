"""The data module NeMo trains from."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.io.mixin import IOMixin
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import Dataset

from qwen_cl.config.tasks import LossOn
from qwen_cl.data.batches import epoch_order, padded_width
from qwen_cl.data.examples import Example, build_examples
from qwen_cl.data.packing import pack_examples
from qwen_cl.data.rows import RowFiles, read_rows

logger = logging.getLogger(__name__)


class TokenDataset(Dataset[Example]):
    """Examples in memory, seen in a new order every epoch; the order depends on the seed and the index alone, so a
    resumed run goes on where it stopped. Without a seed the order is the file's."""

    def __init__(self, examples: list[Example], *, num_samples: int, seed: int | None) -> None:
        self.examples = examples
        self.num_samples = num_samples
        self.seed = seed
        self._epoch, self._order = -1, np.arange(len(examples))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Example:
        epoch, position = divmod(index, len(self.examples))
        if self.seed is None:
            # Past the end: a validation batch is filled up with examples that do not count.
            example = self.examples[position]
            return example if epoch == 0 else replace(example, counted=())
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.examples), self.seed, epoch)
        return self.examples[self._order[position]]


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A micro batch, padded at the end to its longest row: tensors of shape (batch, positions).

    Where a row has several segments there is ``segments`` too: their boundaries in the flattened batch, int32, from 0
    to batch x positions, as attention kernels want them (``cu_seqlens``). Padding is of the segment before it, which
    as attention is causal never sees it.
    """
    width = padded_width([example.num_positions for example in examples])
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
    if len(boundaries) > len(examples):
        batch["segments"] = torch.tensor([*boundaries, tokens.numel()], dtype=torch.int32)
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


class TokenDataModule(pl.LightningDataModule, IOMixin):
    """Trains and validates on token sequences. Subclasses say where the examples come from."""

    def __init__(
        self,
        *,
        tokenizer: AutoTokenizer,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        max_steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.max_steps = max_steps
        self.seed = seed
        self.data_sampler = MegatronDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def build_examples(self) -> tuple[list[Example], list[Example]]:
        """Training and validation examples."""
        raise NotImplementedError

    def data_parallel_size(self) -> int:
        strategy = self.trainer.strategy
        model_parallel = strategy.tensor_model_parallel_size * strategy.pipeline_model_parallel_size
        return int(self.trainer.world_size // model_parallel)

    def setup(self, stage: str | None = None) -> None:
        train, validation = self.build_examples()
        batches = -(-len(validation) // self.global_batch_size)
        num_samples = batches * self.global_batch_size
        self.train_dataset = TokenDataset(train, num_samples=self.max_steps * self.global_batch_size, seed=self.seed)
        self.validation_dataset = TokenDataset(validation, num_samples=num_samples, seed=None)
        # Lightning stops the loader after so many items, which are one rank's micro batches.
        self.trainer.limit_val_batches = num_samples // (self.micro_batch_size * self.data_parallel_size())
        labels = sum(example.num_labels for example in train)
        segments = sum(len(example.starts) for example in train)
        logger.info(
            "%d training examples of %d segments and %d validation examples, %d labels an epoch",
            *(len(train), segments, len(validation), labels),
        )

    def train_dataloader(self) -> WrappedDataLoader:
        return self._dataloader(self.train_dataset, "train")

    def val_dataloader(self) -> WrappedDataLoader:
        return self._dataloader(self.validation_dataset, "validation")

    def _dataloader(self, dataset: TokenDataset, mode: str) -> WrappedDataLoader:
        if mode == "train":
            self.data_sampler.init_global_step = self.trainer.global_step
        return WrappedDataLoader(mode=mode, dataset=dataset, collate_fn=collate, num_workers=0)

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


class RowDataModule(TokenDataModule):
    """Rows of JSON Lines files."""

    def __init__(
        self,
        *,
        train: str,
        validation: str | None,
        validation_every: int,
        fields: list[str],
        loss_on: str,
        packing: bool,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.loss_on = LossOn(loss_on)
        self.packing = packing
        self.files = RowFiles(
            train=train, validation=validation, validation_every=validation_every, fields=tuple(fields)
        )

    def build_examples(self) -> tuple[list[Example], list[Example]]:
        tokenizer = self.tokenizer.tokenizer
        train, validation = (
            [
                example
                for example in build_examples(rows, tokenizer, self.seq_length, self.loss_on)
                if example.num_labels  # cut before its answer: nothing to learn from it
            ]
            for rows in read_rows(self.files)
        )
        # A packed validation set would have the same loss; by itself each row is seen as it is when it is answered.
        return (pack_examples(train, self.seq_length) if self.packing else train), validation


class MockDataModule(TokenDataModule):
    """Random tokens in full sequences. (NeMo's own mock module passes its mask flag as the seed.)"""

    def __init__(self, *, rows: int, vocab_size: int, **common: Any) -> None:
        super().__init__(**common)
        self.rows = rows
        self.vocab_size = vocab_size

    def build_examples(self) -> tuple[list[Example], list[Example]]:
        random = np.random.default_rng(self.seed)

        def examples(count: int) -> list[Example]:
            shape = (count, self.seq_length + 1)
            return [Example(row.tolist(), ((1, len(row)),)) for row in random.integers(0, self.vocab_size, shape)]

        return examples(self.rows), examples(max(1, self.rows // 8))
