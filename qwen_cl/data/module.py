"""The data module NeMo trains from."""

from __future__ import annotations

import logging
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
from qwen_cl.data.examples import Example, build_examples
from qwen_cl.data.rows import RowFiles, read_rows

logger = logging.getLogger(__name__)
PADDING_MULTIPLE = 16
"""Rows are padded to a multiple of this: few distinct shapes, and tensor cores like it."""


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
            return example if epoch == 0 else Example(example.ids, ())
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
        return self.examples[self._order[position]]


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A micro batch, padded at the end to its longest row: tensors of shape (batch, positions)."""
    longest = max(len(example.ids) for example in examples) - 1
    width = -(-longest // PADDING_MULTIPLE) * PADDING_MULTIPLE
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.zeros_like(tokens)
    loss_mask = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels[row, : len(ids) - 1] = ids[1:]
        for start, stop in example.counted:
            loss_mask[row, start - 1 : stop - 1] = 1.0
    position_ids = torch.arange(width).expand(len(examples), width).contiguous()
    return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}


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
        logger.info("%d training and %d validation examples, %d labels an epoch", len(train), len(validation), labels)

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
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.loss_on = LossOn(loss_on)
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
        return train, validation


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
