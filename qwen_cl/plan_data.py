"""The data of a run, read and checked before anything heavy starts: rows, replayed and retained sets, raw text."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_cl.config.data import TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.forgetting import FileReplayConfig, GeneratedReplayConfig
from qwen_cl.config.schema import RunConfig
from qwen_cl.config.tasks import FinetuneConfig, PretrainConfig
from qwen_cl.data.chat import check_chat_template, use_chat_settings
from qwen_cl.data.chat_settings import chat_settings, settle_template_date
from qwen_cl.data.corpus.target import TextTarget, compared_documents
from qwen_cl.data.examples import check_examples, check_labels, load_tokenizer
from qwen_cl.data.fingerprints import as_corpora, of_rows
from qwen_cl.data.held_apart import Apart, hold_apart, replayed, retained, training_rows, validation_rows
from qwen_cl.data.named_sets import NamedSet, local_sets, read_sets
from qwen_cl.data.overlap import Overlap
from qwen_cl.data.raw_text import document_delimiters
from qwen_cl.data.report import DataReport, Layout, count_unused_fields, describe
from qwen_cl.data.rows import RowFiles, read_rows
from qwen_cl.data.set_files import with_set_hashes
from qwen_cl.data.stop_tokens import learns_answers, no_end_warning, teaches_to_stop
from qwen_cl.levers import has_static_shapes
from qwen_cl.source.nemo_context import tokenizer_directory
from qwen_cl.source.reference import ModelFiles
from qwen_cl.source.vocabulary import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ReadData:
    """What reading the rows and sets of a run has told."""

    report: DataReport | None = None
    """None where there are no rows but raw text, which ``with_text`` reads."""
    moved: tuple[int, ...] = ()
    """See ``RowFiles``."""
    bos_token: str | None = None
    """See ``Plan``."""


def read_data(config: RunConfig, model: ModelFiles, files: RowFiles | None) -> ReadData:
    """Raises UserError where it is not as it must be."""
    directory = tokenizer_directory(model.directory)
    tokenizer = load_chat_tokenizer(config, directory)
    task = config.training
    if isinstance(task, FinetuneConfig) and isinstance(config.data, TextDataConfig):
        raise UserError("data=text is raw text, for task=pretrain; task=finetune takes data=jsonl")
    if isinstance(task, FinetuneConfig):
        check_chat_template(tokenizer, str(directory))
        if learns_answers(config) and not teaches_to_stop(tokenizer):
            print(no_end_warning(str(directory)), file=sys.stderr)
    check_tokenizer(tokenizer, model.config, directory)
    layout = row_layout(config)
    replay, kept = _other_sets(config, tokenizer, directory, layout)
    bos_token = _bos_token(config, [*replay, *kept], tokenizer)
    of_texts = of_rows(tokenizer)
    if files is None:
        hold_apart(config.data, replayed(replay, of_texts), retained(kept, of_texts))
        return ReadData(bos_token=bos_token)
    train, validation = read_rows(files)
    check_labels(train, tokenizer, layout.sequence_length, layout.loss_on, files.train)  # describe() renders every row
    check_examples(validation, tokenizer, layout.sequence_length, layout.loss_on, files.validation or files.train)
    apart = hold_apart(
        config.data,
        [training_rows(train, files, of_texts), *replayed(replay, of_texts)],
        [validation_rows(validation, files, of_texts), *retained(kept, of_texts)],
    )
    if apart.moved:
        files = replace(files, moved=tuple(number * files.validation_every for number in apart.moved))
        train, validation = read_rows(files)
        check_examples(validation, tokenizer, layout.sequence_length, layout.loss_on, files.train)
    overlap, *of_kept = apart.overlaps
    unused = {
        "the training set": count_unused_fields(train, tokenizer),
        "the validation set": count_unused_fields(validation, tokenizer),
        **unused_in_sets(replay, kept, tokenizer),
    }
    of_sets = {named.name: each for named, each in zip(kept, of_kept)}
    report = replace(describe(train, tokenizer, layout, overlap, of_sets, unused), near_duplicates=apart.near)
    return ReadData(report, files.moved, bos_token)


def data_hash(target: str, config: RunConfig) -> str:
    """``target`` is the hash of what the task's own data holds; the sets that are replayed and retained come in too.
    Not text that the model writes itself, which follows from model, seed and config."""
    sets = {"replay.sets": _replay_sets(config), "retention.sets": config.retention.sets}
    return with_set_hashes(target, sets, chat_settings(config.data).facts())


def settle_day(config: RunConfig, model: ModelFiles, made_on: str | None) -> str | None:
    """The day that conversations of the run are rendered with; None where there are none, or none has a date."""
    if not isinstance(config.task, FinetuneConfig) and not _replay_sets(config) and not config.retention.sets:
        return None
    return settle_template_date(config.data, load_tokenizer(str(tokenizer_directory(model.directory))), made_on)


def with_local_sets(config: RunConfig) -> RunConfig:
    """The worker runs elsewhere, and without a network."""
    replay = config.replay
    if isinstance(replay, FileReplayConfig):
        replay = replace(replay, sets=local_sets(replay.sets, "replay.sets"))
    kept = local_sets(config.retention.sets, "retention.sets")
    return replace(config, replay=replay, retention=replace(config.retention, sets=kept))


def hold_text_apart(
    text: TextTarget, data: TextDataConfig, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Apart, dict[str, Overlap]]:
    """What validates, and each retention set, beside what is trained on. Raises UserError where it must not be."""
    train, validation = compared_documents(text, data, tokenizer)
    as_corpus = as_corpora(tokenizer)
    replay, kept = read_other_sets(config)
    apart = hold_apart(data, [train, *replayed(replay, as_corpus)], [validation, *retained(kept, as_corpus)])
    return apart, dict(zip(config.retention.sets, apart.overlaps[1:]))


def load_chat_tokenizer(config: RunConfig, directory: Path) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with what ``data`` says of how conversations are rendered."""
    return use_chat_settings(load_tokenizer(str(directory)), chat_settings(config.data))


def unused_in_sets(
    replay: list[NamedSet], kept: list[NamedSet], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, int]]:
    """Count the fields of each set that cannot change what it is rendered as, by the set's key."""
    keys = {"replay.sets": replay, "retention.sets": kept}
    found = {
        f"{key}.{named.name}": count_unused_fields(named.rows, tokenizer)
        for key, sets in keys.items()
        for named in sets
    }
    return {name: counts for name, counts in found.items() if counts}


def row_layout(config: RunConfig) -> Layout:
    """Say how the run makes micro batches of its rows."""
    task = config.training
    return Layout(
        sequence_length=task.sequence_length,
        micro_batch_size=task.rows_per_pass,
        seed=config.seed,
        loss_on=task.trained_tokens,
        packing=task.is_packed,
        static_shapes=has_static_shapes(config),
    )


def _other_sets(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, directory: Path, layout: Layout
) -> tuple[list[NamedSet], list[NamedSet]]:
    """What is replayed, and what is retained, checked."""
    replay, kept = read_other_sets(config)
    for named in [*replay, *kept]:
        if not named.is_text:
            check_chat_template(tokenizer, str(directory))
        check_examples(named.rows, tokenizer, layout.sequence_length, layout.loss_on, named.path)
    return replay, kept


def read_other_sets(config: RunConfig) -> tuple[list[NamedSet], list[NamedSet]]:
    """Read what is replayed, and what is retained. Raises UserError."""
    return read_sets(_replay_sets(config), "replay.sets"), read_sets(config.retention.sets, "retention.sets")


def _replay_sets(config: RunConfig) -> dict[str, str]:
    return config.replay.sets if isinstance(config.replay, FileReplayConfig) else {}


def _bos_token(config: RunConfig, sets: list[NamedSet], tokenizer: PreTrainedTokenizerBase) -> str | None:
    raw_text = isinstance(config.task, PretrainConfig) or isinstance(config.replay, GeneratedReplayConfig)
    if not raw_text and not any(named.is_text for named in sets):
        return None
    bos_id = document_delimiters(tokenizer).bos_id
    return None if bos_id is None else str(tokenizer.convert_ids_to_tokens(bos_id))
