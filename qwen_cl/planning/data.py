"""Reading and checking of a run's data before it starts: rows, replay and retention sets, raw text."""

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
    """The result of reading the rows and sets of a run."""

    report: DataReport | None = None
    """Data report; None for raw text, which ``with_text`` reads."""
    moved: tuple[int, ...] = ()
    """See ``RowFiles``."""
    bos_token: str | None = None
    """See ``Plan``."""


def read_data(config: RunConfig, model: ModelFiles, files: RowFiles | None) -> ReadData:
    """Read and check the rows and sets of a run. Raises UserError."""
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
    replay, retention = _other_sets(config, tokenizer, directory, layout)
    bos_token = _bos_token(config, [*replay, *retention], tokenizer)
    fingerprinter = row_fingerprinter(tokenizer)
    if files is None:
        check_leakage(config.data, replayed(replay, fingerprinter), retained(retention, fingerprinter))
        return ReadData(bos_token=bos_token)
    train, validation = read_rows(files)
    check_labels(train, tokenizer, layout.sequence_length, layout.loss_on, files.train)  # describe() renders every row
    check_examples(validation, tokenizer, layout.sequence_length, layout.loss_on, files.validation or files.train)
    leakage = check_leakage(
        config.data,
        [training_rows(train, files, fingerprinter), *replayed(replay, fingerprinter)],
        [validation_rows(validation, files, fingerprinter), *retained(retention, fingerprinter)],
    )
    if leakage.moved:
        files = replace(files, moved=tuple(number * files.validation_every for number in leakage.moved))
        train, validation = read_rows(files)
        check_examples(validation, tokenizer, layout.sequence_length, layout.loss_on, files.train)
    overlap, *retention_overlaps = leakage.overlaps
    unused = {
        "the training set": count_unused_fields(train, tokenizer),
        "the validation set": count_unused_fields(validation, tokenizer),
        **unused_in_sets(replay, retention, tokenizer),
    }
    overlap_by_set = {named.name: each for named, each in zip(retention, retention_overlaps)}
    report = replace(describe(train, tokenizer, layout, overlap, overlap_by_set, unused), near_duplicates=leakage.near)
    return ReadData(report, files.moved, bos_token)


def data_hash(target: str, config: RunConfig) -> str:
    """Return the hash of the run's data: ``target``, the hash of the task's own data, with replay and retention sets.
    Self-generated replay is not included, as it follows from model, seed and config."""
    sets = {"replay.datasets": _replay_sets(config), "retention.eval_sets": config.retention.eval_sets}
    return with_set_hashes(target, sets, chat_settings(config.data).non_defaults())


def resolve_run_template_date(config: RunConfig, model: ModelFiles, run_date: str | None) -> str | None:
    """Return the date that the run's conversations are rendered with; None if none is rendered."""
    if not isinstance(config.task, FinetuneConfig) and not _replay_sets(config) and not config.retention.eval_sets:
        return None
    return resolve_template_date(config.data, load_data_tokenizer(str(tokenizer_directory(model.directory))), run_date)


def with_local_sets(config: RunConfig) -> RunConfig:
    """Replace the paths of sets with local ones, as workers may run on other nodes without a network."""
    replay = config.replay
    if isinstance(replay, FileReplayConfig):
        replay = replace(replay, datasets=local_sets(replay.datasets, "replay.datasets"))
    retention = local_sets(config.retention.eval_sets, "retention.eval_sets")
    return replace(config, replay=replay, retention=replace(config.retention, eval_sets=retention))


def check_text_leakage(
    text: TextTarget, data: TextDataConfig, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[LeakageReport, dict[str, Overlap]]:
    """Check the validation text and each retention set against the training data. Raises UserError."""
    train, validation = documents_to_compare(text, data, tokenizer)
    fingerprinter = corpus_fingerprinter(tokenizer)
    replay, retention = read_other_sets(config)
    leakage = check_leakage(
        data, [train, *replayed(replay, fingerprinter)], [validation, *retained(retention, fingerprinter)]
    )
    return leakage, dict(zip(config.retention.eval_sets, leakage.overlaps[1:]))


def load_chat_tokenizer(config: RunConfig, directory: Path) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with the chat settings of ``data``."""
    return use_chat_settings(load_data_tokenizer(str(directory)), chat_settings(config.data))


def unused_in_sets(
    replay: list[NamedSet], retention: list[NamedSet], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, int]]:
    """Count the fields of each set that are not rendered, by the set's key."""
    keys = {"replay.datasets": replay, "retention.eval_sets": retention}
    found = {
        f"{key}.{named.name}": count_unused_fields(named.rows, tokenizer)
        for key, sets in keys.items()
        for named in sets
    }
    return {name: counts for name, counts in found.items() if counts}


def row_layout(config: RunConfig) -> SequenceLayout:
    """Return the settings by which the run's rows become micro batches."""
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
    """Read and check the replay and the retention sets."""
    replay, retention = read_other_sets(config)
    for named in [*replay, *retention]:
        if not named.is_text:
            check_chat_template(tokenizer, str(directory))
        check_examples(named.rows, tokenizer, layout.sequence_length, layout.loss_on, named.path)
    return replay, retention


def read_other_sets(config: RunConfig) -> tuple[list[NamedSet], list[NamedSet]]:
    """Read the replay and the retention sets. Raises UserError."""
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
    """Return the config with the dataset commits of the resumed run, where the command names none."""
    if not isinstance(config.data, FileDataConfig) or not folder.config.exists():
        return config
    before = read_run_config(folder.config).data
    if not isinstance(before, FileDataConfig):
        return config
    path, validation = reuse_commit(config.data.path, before.path), config.data.validation_path
    if validation is not None and before.validation_path is not None:
        validation = reuse_commit(validation, before.validation_path)
    return replace(config, data=replace(config.data, path=path, validation_path=validation))
