"""The data modules of a run: where the examples of the target come from, and what is mixed in and measured beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwen_cl.config.tasks import LossOn
from qwen_cl.data.chat import use_chat_settings
from qwen_cl.data.chat_settings import ChatSettings
from qwen_cl.data.corpus.examples import CorpusExamples
from qwen_cl.data.corpus.selection import Selection
from qwen_cl.data.corpus.target import TextTarget
from qwen_cl.data.examples import Example
from qwen_cl.data.module import Sets, TokenDataModule
from qwen_cl.data.named_sets import TARGET, NamedSet, ScoredSet, read_sets, score_set
from qwen_cl.data.packing import pack_examples
from qwen_cl.data.raw_text import Delimiters
from qwen_cl.data.rows import RowFiles, Text, read_rows


class MixedDataModule(TokenDataModule):
    """The target, with other sets replayed in fixed shares, and others measured."""

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
        """What is trained on, and what is held out of it."""
        raise NotImplementedError

    def build_sets(self) -> Sets:
        use_chat_settings(self.tokenizer.tokenizer, self.chat)
        target, validation = self.build_target()
        replay = read_sets(self.replay, "replay.sets")
        replayed = [(self.to_train(named), self.replay_shares[named.name]) for named in replay]
        kept = [self.score(named, "retention/") for named in read_sets(self.retention, "retention.sets")]
        own_share = 1 - sum(self.replay_shares.values())
        return Sets(train=[(target, own_share), *replayed], evaluation=[validation, *kept])

    def score(self, named: NamedSet, prefix: str = "") -> ScoredSet:
        """Not packed: the loss would be the same, and a row by itself is seen as it is when it is answered."""
        scored = score_set(named, self.tokenizer.tokenizer, self.seq_length, self.loss_on)
        return replace(scored, name=prefix + scored.name)

    def to_train(self, named: NamedSet) -> Sequence[Example]:
        examples = self.score(named).examples
        return pack_examples(examples, self.seq_length) if self.packing and not named.is_text else examples


class RowDataModule(MixedDataModule):
    """Rows of files, in memory."""

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
    """Raw text that the launcher has tokenised: sequences are cut from the file as they are asked for."""

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
    """Random tokens in full sequences. (NeMo's own mock module passes its mask flag as the seed.)"""

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
