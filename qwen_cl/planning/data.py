"""The data of a run, read and checked before anything heavy starts: rows, replayed and retained sets, raw text."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_cl.config.data import FileDataConfig, TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.replay import FileReplayConfig, GeneratedReplayConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import read_run_config
from qwen_cl.config.task.training import FinetuneConfig, PretrainConfig
from qwen_cl.data.chat.encode import check_chat_template, use_chat_settings
from qwen_cl.data.chat.settings import chat_settings, resolve_template_date
from qwen_cl.data.chat.stop_tokens import has_stop_token, missing_stop_token_warning, trains_on_conversations
from qwen_cl.data.corpus.text_dataset import TextTarget, documents_to_compare
from qwen_cl.data.eval_sets import NamedSet, local_sets, read_sets
from qwen_cl.data.examples import check_examples, check_labels, load_data_tokenizer
from qwen_cl.data.fingerprints import corpus_fingerprinter, row_fingerprinter
from qwen_cl.data.hub_copy import reuse_commit
from qwen_cl.data.leakage import LeakageReport, check_leakage, replayed, retained, training_rows, validation_rows
from qwen_cl.data.overlap import Overlap
from qwen_cl.data.raw_text import document_delimiters
from qwen_cl.data.rows import RowFiles, read_rows
from qwen_cl.data.set_files import with_set_hashes
from qwen_cl.data.statistics import DataReport, SequenceLayout, count_unused_fields, describe
from qwen_cl.models.formats.nemo_layout import tokenizer_directory
from qwen_cl.models.reference import ModelFiles
from qwen_cl.models.tokenizer_checks import check_tokenizer
from qwen_cl.planning.speed import has_static_shapes
from qwen_cl.runs.folder import RunFolder

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
        if trains_on_conversations(config) and not has_stop_token(tokenizer):
            print(missing_stop_token_warning(str(directory)), file=sys.stderr)
    check_tokenizer(tokenizer, model.config, directory)
    layout = row_layout(config)
    replay, kept = _other_sets(config, tokenizer, directory, layout)
    bos_token = _bos_token(config, [*replay, *kept], tokenizer)
    of_texts = row_fingerprinter(tokenizer)
    if files is None:
        check_leakage(config.data, replayed(replay, of_texts), retained(kept, of_texts))
        return ReadData(bos_token=bos_token)
    train, validation = read_rows(files)
    check_labels(train, tokenizer, layout.sequence_length, layout.loss_on, files.train)  # describe() renders every row
    check_examples(validation, tokenizer, layout.sequence_length, layout.loss_on, files.validation or files.train)
    leakage = check_leakage(
        config.data,
        [training_rows(train, files, of_texts), *replayed(replay, of_texts)],
        [validation_rows(validation, files, of_texts), *retained(kept, of_texts)],
    )
    if leakage.moved:
        files = replace(files, moved=tuple(number * files.validation_every for number in leakage.moved))
        train, validation = read_rows(files)
        check_examples(validation, tokenizer, layout.sequence_length, layout.loss_on, files.train)
    overlap, *of_kept = leakage.overlaps
    unused = {
        "the training set": count_unused_fields(train, tokenizer),
        "the validation set": count_unused_fields(validation, tokenizer),
        **unused_in_sets(replay, kept, tokenizer),
    }
    of_sets = {named.name: each for named, each in zip(kept, of_kept)}
    report = replace(describe(train, tokenizer, layout, overlap, of_sets, unused), near_duplicates=leakage.near)
    return ReadData(report, files.moved, bos_token)


def data_hash(target: str, config: RunConfig) -> str:
    """``target`` is the hash of what the task's own data holds; the sets that are replayed and retained come in too.
    Not text that the model writes itself, which follows from model, seed and config."""
    sets = {"replay.datasets": _replay_sets(config), "retention.eval_sets": config.retention.eval_sets}
    return with_set_hashes(target, sets, chat_settings(config.data).non_defaults())


def resolve_run_template_date(config: RunConfig, model: ModelFiles, run_date: str | None) -> str | None:
    """The day that conversations of the run are rendered with; None where there are none, or none has a date."""
    if not isinstance(config.task, FinetuneConfig) and not _replay_sets(config) and not config.retention.eval_sets:
        return None
    return resolve_template_date(config.data, load_data_tokenizer(str(tokenizer_directory(model.directory))), run_date)


def with_local_sets(config: RunConfig) -> RunConfig:
    """The worker runs elsewhere, and without a network."""
    replay = config.replay
    if isinstance(replay, FileReplayConfig):
        replay = replace(replay, datasets=local_sets(replay.datasets, "replay.datasets"))
    kept = local_sets(config.retention.eval_sets, "retention.eval_sets")
    return replace(config, replay=replay, retention=replace(config.retention, eval_sets=kept))


def check_text_leakage(
    text: TextTarget, data: TextDataConfig, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[LeakageReport, dict[str, Overlap]]:
    """What validates, and each retention set, beside what is trained on. Raises UserError where it must not be."""
    train, validation = documents_to_compare(text, data, tokenizer)
    as_corpus = corpus_fingerprinter(tokenizer)
    replay, kept = read_other_sets(config)
    leakage = check_leakage(data, [train, *replayed(replay, as_corpus)], [validation, *retained(kept, as_corpus)])
    return leakage, dict(zip(config.retention.eval_sets, leakage.overlaps[1:]))


def load_chat_tokenizer(config: RunConfig, directory: Path) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with what ``data`` says of how conversations are rendered."""
    return use_chat_settings(load_data_tokenizer(str(directory)), chat_settings(config.data))


def unused_in_sets(
    replay: list[NamedSet], kept: list[NamedSet], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, int]]:
    """Count the fields of each set that cannot change what it is rendered as, by the set's key."""
    keys = {"replay.datasets": replay, "retention.eval_sets": kept}
    found = {
        f"{key}.{named.name}": count_unused_fields(named.rows, tokenizer)
        for key, sets in keys.items()
        for named in sets
    }
    return {name: counts for name, counts in found.items() if counts}


def row_layout(config: RunConfig) -> SequenceLayout:
    """Say how the run makes micro batches of its rows."""
    task = config.training
    return SequenceLayout(
        sequence_length=task.sequence_length,
        micro_batch_size=task.resolved_micro_batch_size,
        seed=config.seed,
        loss_on=task.trained_tokens,
        packing=task.is_packed,
        static_shapes=has_static_shapes(config),
    )


def _other_sets(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, directory: Path, layout: SequenceLayout
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
    return read_sets(_replay_sets(config), "replay.datasets"), read_sets(
        config.retention.eval_sets, "retention.eval_sets"
    )


def _replay_sets(config: RunConfig) -> dict[str, str]:
    return config.replay.datasets if isinstance(config.replay, FileReplayConfig) else {}


def _bos_token(config: RunConfig, sets: list[NamedSet], tokenizer: PreTrainedTokenizerBase) -> str | None:
    raw_text = isinstance(config.task, PretrainConfig) or isinstance(config.replay, GeneratedReplayConfig)
    if not raw_text and not any(named.is_text for named in sets):
        return None
    bos_id = document_delimiters(tokenizer).bos_id
    return None if bos_id is None else str(tokenizer.convert_ids_to_tokens(bos_id))


def reuse_datasets(config: RunConfig, folder: RunFolder) -> RunConfig:
    """A run that resumes reads the commits it began with where the command names none."""
    if not isinstance(config.data, FileDataConfig) or not folder.config.exists():
        return config
    before = read_run_config(folder.config).data
    if not isinstance(before, FileDataConfig):
        return config
    path, validation = reuse_commit(config.data.path, before.path), config.data.validation_path
    if validation is not None and before.validation_path is not None:
        validation = reuse_commit(validation, before.validation_path)
    return replace(config, data=replace(config.data, path=path, validation_path=validation))
