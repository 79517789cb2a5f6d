"""The data module NeMo trains from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.io.mixin import IOMixin
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from qwen_cl.config.task.training import LossOn
from qwen_cl.data.batching import padded_width
from qwen_cl.data.chat.encode import use_chat_settings
from qwen_cl.data.chat.settings import ChatSettings
from qwen_cl.data.collate import StaticShape, collate
from qwen_cl.data.corpus.examples import CorpusExamples
from qwen_cl.data.corpus.selection import Selection
from qwen_cl.data.corpus.text_dataset import TextTarget
from qwen_cl.data.eval_sets import NamedSet, ScoredSet, read_sets, score_set
from qwen_cl.data.examples import Example
from qwen_cl.data.mixing import Mixture
from qwen_cl.data.packing import pack_examples
from qwen_cl.data.raw_text import Delimiters
from qwen_cl.data.rows import RowFiles, Text, read_rows
from qwen_cl.runs.metrics import TARGET

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sets:
    """The training and evaluation sets of a run."""

    train: list[tuple[Sequence[Example], float]]
    """Each set with its share of the labels."""
    evaluation: list[ScoredSet]
    """Each set under the name of its metrics."""


class TokenDataModule(pl.LightningDataModule, IOMixin):
    """The base of the data modules of token sequences; subclasses provide the examples."""

    raw_text = False
    """The target is raw text, not conversations."""

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
        """Fixed shape of the training micro batches, or None."""
        self.data_sampler = MegatronDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def build_sets(self) -> Sets:
        """Return the training and evaluation sets."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        sets = self.build_sets()
        self.train_dataset = Mixture(
            [examples for examples, _ in sets.train],
            [share for _, share in sets.train],
            # One batch more than is trained on: Megatron's sampler refuses to resume when no samples are left.
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
    """Return the largest number of segments of an example; those of a corpus, which is no list, have one."""
    return max(len(example.starts) for example in examples) if isinstance(examples, list) else 1


class MixedDataModule(TokenDataModule):
    """The target mixed with replay sets in fixed ratios, evaluated on the validation and retention sets."""

    def __init__(
        self,
        *,
        loss_on: str,
        packing: bool,
        replay: dict[str, str],
        replay_shares: dict[str, float],
        retention: dict[str, str],
        chat: dict[str, Any] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.loss_on = LossOn(loss_on)
        self.packing = packing
        self.replay, self.replay_shares, self.retention = replay, replay_shares, retention
        self.chat = ChatSettings(**(chat or {}))

    def build_target(self) -> tuple[Sequence[Example], ScoredSet]:
        """Return the training examples and the validation set of the target."""
        raise NotImplementedError

    def build_sets(self) -> Sets:
        use_chat_settings(self.tokenizer.tokenizer, self.chat)
        target, validation = self.build_target()
        replay = read_sets(self.replay, "replay.datasets")
        replayed = [(self.to_train(named), self.replay_shares[named.name]) for named in replay]
        kept = [self.score(named, "retention/") for named in read_sets(self.retention, "retention.eval_sets")]
        own_share = 1 - sum(self.replay_shares.values())
        return Sets(train=[(target, own_share), *replayed], evaluation=[validation, *kept])

    def score(self, named: NamedSet, prefix: str = "") -> ScoredSet:
        """Build an evaluation set, not packed: the loss is the same, and each row is seen as at inference."""
        scored = score_set(named, self.tokenizer.tokenizer, self.seq_length, self.loss_on)
        return replace(scored, name=prefix + scored.name)

    def to_train(self, named: NamedSet) -> Sequence[Example]:
        examples = self.score(named).examples
        return pack_examples(examples, self.seq_length) if self.packing and not named.is_text else examples


class RowDataModule(MixedDataModule):
    """The data module of rows read from files, held in memory."""

    def __init__(
        self,
        *,
        train: str,
        validation: str | None,
        validation_every: int,
        raw_text: bool,
        fields: dict[str, str],
        moved: list[int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.files = RowFiles(
            train=train,
            validation=validation,
            validation_every=validation_every,
            raw_text=raw_text,
            fields=dict(fields),
            moved=tuple(moved or ()),
        )

    def build_target(self) -> tuple[Sequence[Example], ScoredSet]:
        train, validation = read_rows(self.files)
        self.raw_text = isinstance(train[0], Text)
        path = self.files.validation or self.files.train
        return (
            self.to_train(NamedSet("target", self.files.train, train, [])),
            self.score(NamedSet(TARGET, path, validation, [])),
        )


class TextDataModule(MixedDataModule):
    """The data module of raw text that the launcher has tokenized; sequences are read lazily from the file."""

    raw_text = True

    def __init__(self, *, target: dict[str, Any], **common: Any) -> None:
        super().__init__(**common)
        self.target = target

    def build_target(self) -> tuple[Sequence[Example], ScoredSet]:
        target = TextTarget.parse(self.target)
        trained, measured = target.split()
        num_bytes = measured.text_bytes() or 0
        scored = ScoredSet(TARGET, self._examples(target, measured), len(measured.documents), num_bytes)
        return self._examples(target, trained), scored

    def _examples(self, target: TextTarget, selection: Selection) -> CorpusExamples:
        delimiters = Delimiters(target.bos_id, self.tokenizer.tokenizer.eos_token_id)
        return CorpusExamples(selection, self.seq_length, delimiters)


class MockDataModule(TokenDataModule):
    """The data module of random tokens in full sequences. (NeMo's mock module passes its mask flag as the seed.)"""

    def __init__(self, *, rows: int, vocab_size: int, **common: Any) -> None:
        super().__init__(**common)
        self.rows = rows
        self.vocab_size = vocab_size

    def build_sets(self) -> Sets:
        random = np.random.default_rng(self.seed)

        def examples(count: int) -> list[Example]:
            shape = (count, self.seq_length + 1)
            return [Example(row.tolist(), ((1, len(row)),)) for row in random.integers(0, self.vocab_size, shape)]

        held_out = max(1, self.rows // 8)
        return Sets([(examples(self.rows), 1.0)], [ScoredSet(TARGET, examples(held_out), held_out, 0)])
