"""Everything about a run that can be known and refused before anything heavy starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwen_cl.checkpoints.manifest import MANIFEST, DamagedCheckpointError, verify
from qwen_cl.config.data import MockDataConfig, TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.forgetting import FileReplayConfig, GeneratedReplayConfig
from qwen_cl.config.schema import DoraConfig, RunConfig
from qwen_cl.config.tasks import FinetuneConfig, LossOn, PretrainConfig
from qwen_cl.data.chat import check_chat_template, use_chat_settings
from qwen_cl.data.chat_settings import chat_settings, settle_template_date, with_template_date
from qwen_cl.data.corpus.report import describe_corpus
from qwen_cl.data.corpus.target import TextTarget, compared_documents, prepare_target, settle_separator, text_content
from qwen_cl.data.examples import check_examples, check_labels, load_tokenizer
from qwen_cl.data.fingerprints import as_corpora, of_rows
from qwen_cl.data.held_apart import Apart, hold_apart, replayed, retained, training_rows, validation_rows
from qwen_cl.data.named_sets import NamedSet, local_sets, read_sets
from qwen_cl.data.overlap import Overlap
from qwen_cl.data.raw_text import document_delimiters
from qwen_cl.data.report import DataReport, Layout, count_unused_fields, describe
from qwen_cl.data.rows import RowFiles, content_hash, pin_rows, read_rows, row_files
from qwen_cl.data.set_files import with_set_hashes
from qwen_cl.data.stop_tokens import learns_answers, no_end_warning, teaches_to_stop
from qwen_cl.devices import Device, pick_device
from qwen_cl.layout import check_layout
from qwen_cl.levers import has_static_shapes
from qwen_cl.micro_batch import is_automatic, settle_for_device
from qwen_cl.source.architecture import Architecture, read_architecture
from qwen_cl.source.base_adapter import BaseAdapter, find_adapter, other_base
from qwen_cl.source.checkpoint import check_tensors
from qwen_cl.source.nemo_checkpoint import check_nemo_tensors
from qwen_cl.source.nemo_context import is_nemo_checkpoint, tokenizer_directory
from qwen_cl.source.reference import ModelFiles, resolve
from qwen_cl.source.settings import HubSettings
from qwen_cl.source.vocabulary import check_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    config: RunConfig
    """With model.source and datasets pinned, model.cache absolute, and accelerator, precision, micro batch and speed
    settled."""
    model: ModelFiles
    architecture: Architecture
    device: Device
    files: RowFiles | None
    text: TextTarget | None
    """Raw text once it is tokenised."""
    data_hash: str | None
    """sha256 of all that is trained on and measured; None for random tokens, and before raw text is tokenised."""
    data_report: DataReport | None
    """None for random tokens, and before raw text is tokenised."""
    tokenizer_hash: str | None
    adapter: BaseAdapter | None
    """Merged into the frozen base."""
    bos_token: str | None
    """What documents of raw text begin with; None where the tokenizer adds none, or where there are none."""
    automatic_micro_batch: bool
    """It was settled here, by this machine's memory."""

    @property
    def tokens_per_step(self) -> int:
        """At most: padding and short rows make it less."""
        return self.config.training.global_batch_size * self.config.training.sequence_length

    def content(self) -> str | None:
        """Hash of the data as it is now, also of raw text that is not tokenised yet."""
        data = self.config.data
        return data_hash(text_content(data), self.config) if isinstance(data, TextDataConfig) else self.data_hash


@dataclass(frozen=True, slots=True)
class ReadData:
    """What reading the rows and sets of a run has told."""

    report: DataReport | None = None
    """None where there are no rows but raw text, which ``with_text`` reads."""
    moved: tuple[int, ...] = ()
    """See ``RowFiles``."""
    bos_token: str | None = None
    """See ``Plan``."""


class Once:
    """What several plans have in common, each made once: reading data and asking the Hub take long."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, make: Callable[[], T], *on: Any) -> T:
        """``on`` is all that what is made depends on, with a ``repr`` that says it."""
        key = repr(on)
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


def make_plan(config: RunConfig, once: Once | None = None, made_on: str | None = None) -> Plan:
    """Settle what is open in the config and check the rest, cheapest first.

    Fetches the model's small files, not its weights. ``made_on`` is the day that the run was made on, if it is not
    today.

    Raises:
        UserError: the run could not work, with what to change.
    """
    once = once or Once()
    said = config
    device = once(lambda: pick_device(said.cluster), "device", said.cluster)
    settings = HubSettings.of(config.model)
    model = once(lambda: resolve(said.model.source, settings, weights=False), "model", said.model)
    architecture = read_architecture(model.config, model.directory)
    adapter = once(lambda: _adapter(said, model, architecture), "adapter", said.model, said.peft)
    check_layout(config.cluster, config.peft, architecture)
    _check_sequence_length(config, architecture)
    if model.commit is None:
        once(lambda: check_weights(model, architecture), "weights", said.model)
    sets = once(lambda: _with_local_sets(said), "sets", said.replay, said.retention)
    data = once(lambda: pin_rows(said.data), "rows", said.data)
    config = replace(config, data=data, replay=sets.replay, retention=sets.retention)
    config = settle_for_device(config, architecture, device)
    if isinstance(config.data, TextDataConfig):
        config = replace(config, data=settle_separator(config.data))
    on_day = (said.model, said.data, said.replay, said.retention, type(said.task), made_on)
    day = once(lambda: _template_date(said, model, made_on), "template date", on_day)
    config = replace(config, data=with_template_date(config.data, day))
    files = row_files(config.data, config.training)
    read = config
    on = (said.model, config.data, config.replay, config.retention, _layout(config), type(config.task))
    found = ReadData()
    if not isinstance(config.data, MockDataConfig):
        found = once(lambda: _read_data(read, model, files), "data", on)
    settled = replace(
        config,
        model=replace(
            config.model,
            source=model.source,
            adapter=None if adapter is None else str(adapter.directory),
            cache=None if config.model.cache is None else str(settings.cache_directory),
        ),
        cluster=replace(config.cluster, accelerator=device.kind, precision=device.precision),
    )
    return Plan(
        config=settled,
        model=model,
        architecture=architecture,
        device=device,
        files=None if files is None else replace(files, moved=found.moved),
        text=None,
        data_hash=once(lambda: data_hash(content_hash(files), read), "hash", files, on) if files else None,
        data_report=found.report,
        tokenizer_hash=tokenizer_hash(tokenizer_directory(model.directory)),
        adapter=adapter,
        bos_token=found.bos_token,
        automatic_micro_batch=is_automatic(said),
    )


def data_hash(target: str, config: RunConfig) -> str:
    """``target`` is the hash of what the task's own data holds; the sets that are replayed and retained come in too.
    Not text that the model writes itself, which follows from model, seed and config."""
    sets = {"replay.sets": _replay_sets(config), "retention.sets": config.retention.sets}
    return with_set_hashes(target, sets, chat_settings(config.data).facts())


def _template_date(config: RunConfig, model: ModelFiles, made_on: str | None) -> str | None:
    """The day that conversations of the run are rendered with; None where there are none, or none has a date."""
    if not isinstance(config.task, FinetuneConfig) and not _replay_sets(config) and not config.retention.sets:
        return None
    return settle_template_date(config.data, load_tokenizer(str(tokenizer_directory(model.directory))), made_on)


def _with_local_sets(config: RunConfig) -> RunConfig:
    """The worker runs elsewhere, and without a network."""
    replay = config.replay
    if isinstance(replay, FileReplayConfig):
        replay = replace(replay, sets=local_sets(replay.sets, "replay.sets"))
    kept = local_sets(config.retention.sets, "retention.sets")
    return replace(config, replay=replay, retention=replace(config.retention, sets=kept))


def _replay_sets(config: RunConfig) -> dict[str, str]:
    return config.replay.sets if isinstance(config.replay, FileReplayConfig) else {}


def with_text(plan: Plan, data: TextDataConfig) -> Plan:
    """Tokenises the raw text, which may take a while: not for a dry run.

    Raises:
        UserError: the text cannot be trained on.
    """
    tokenizer = _load_tokenizer(plan.config, tokenizer_directory(plan.model.directory))
    text = prepare_target(data, plan.config.seed, tokenizer, plan.architecture.vocab_size)
    apart, kept = _hold_text_apart(text, data, plan.config, tokenizer)
    text = text.with_moved(apart.moved)
    replay, retention = _read_sets(plan.config)
    report = replace(
        describe_corpus(text, tokenizer, _layout(plan.config), apart.overlaps[0], kept),
        near_duplicates=apart.near,
        unused_fields=_unused_in_sets(replay, retention, tokenizer),
    )
    return replace(plan, text=text, data_report=report, data_hash=data_hash(text.content, plan.config))


def fetch_weights(plan: Plan) -> Plan:
    """Make the weights present and check them; whether the output layer is the embedding, they alone can say."""
    model = resolve(plan.model.source, HubSettings.of(plan.config.model))
    architecture = read_architecture(model.config, model.directory)
    check_weights(model, architecture)
    adapter = find_adapter(plan.config.model.adapter, model.directory, architecture)
    return replace(plan, architecture=architecture, adapter=adapter)


def _adapter(config: RunConfig, model: ModelFiles, architecture: Architecture) -> BaseAdapter | None:
    adapter = find_adapter(config.model.adapter, model.directory, architecture)
    if adapter is None:
        return None
    if isinstance(config.peft, DoraConfig):
        raise UserError(
            "peft=dora with model.adapter is not supported: its magnitudes would be of the merged weights, which no "
            "adapter of the base can say. Write peft=lora, or export the first run merged and name that as model.source"
        )
    if other := other_base(adapter, model.source):
        print(
            f"note: model.adapter ({adapter.directory}) says that it was trained on {other}, and is merged into "
            f"{model.source}, which it fits by its shapes",
            file=sys.stderr,
        )
    return adapter


def check_weights(model: ModelFiles, architecture: Architecture) -> None:
    """Raises UserError where the files' own lists of tensors are not this architecture's."""
    if (model.directory / MANIFEST).is_file():  # a checkpoint of a run of ours
        try:
            verify(model.directory)
        except DamagedCheckpointError as error:
            raise UserError(f"model.source ({model.directory}) is damaged: {error}; put the file back") from error
    check = check_nemo_tensors if is_nemo_checkpoint(model.directory) else check_tensors
    check(model.directory, architecture)


def _check_sequence_length(config: RunConfig, architecture: Architecture) -> None:
    if config.training.sequence_length > architecture.longest_sequence:
        limit = "sliding_window" if architecture.sliding_window else "max_position_embeddings"
        raise UserError(
            f"task.sequence_length ({config.training.sequence_length}) must be at most the model's "
            f"{limit} ({architecture.longest_sequence})"
        )


def _read_data(config: RunConfig, model: ModelFiles, files: RowFiles | None) -> ReadData:
    """Raises UserError where it is not as it must be."""
    directory = tokenizer_directory(model.directory)
    tokenizer = _load_tokenizer(config, directory)
    task = config.training
    if isinstance(task, FinetuneConfig) and isinstance(config.data, TextDataConfig):
        raise UserError("data=text is raw text, for task=pretrain; task=finetune takes data=jsonl")
    if isinstance(task, FinetuneConfig):
        check_chat_template(tokenizer, str(directory))
        if learns_answers(config) and not teaches_to_stop(tokenizer):
            print(no_end_warning(str(directory)), file=sys.stderr)
    check_tokenizer(tokenizer, model.config, directory)
    layout = _layout(config)
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
        **_unused_in_sets(replay, kept, tokenizer),
    }
    of_sets = {named.name: each for named, each in zip(kept, of_kept)}
    report = replace(describe(train, tokenizer, layout, overlap, of_sets, unused), near_duplicates=apart.near)
    return ReadData(report, files.moved, bos_token)


def _load_tokenizer(config: RunConfig, directory: Path) -> PreTrainedTokenizerBase:
    return use_chat_settings(load_tokenizer(str(directory)), chat_settings(config.data))


def _unused_in_sets(
    replay: list[NamedSet], kept: list[NamedSet], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, int]]:
    keys = {"replay.sets": replay, "retention.sets": kept}
    found = {
        f"{key}.{named.name}": count_unused_fields(named.rows, tokenizer)
        for key, sets in keys.items()
        for named in sets
    }
    return {name: counts for name, counts in found.items() if counts}


def _layout(config: RunConfig) -> Layout:
    task = config.training
    return Layout(
        sequence_length=task.sequence_length,
        micro_batch_size=task.rows_per_pass,
        seed=config.seed,
        loss_on=task.loss_on if isinstance(task, FinetuneConfig) else LossOn.all,
        packing=isinstance(task, FinetuneConfig) and task.packing,
        static_shapes=has_static_shapes(config),
    )


def _other_sets(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, directory: Path, layout: Layout
) -> tuple[list[NamedSet], list[NamedSet]]:
    """What is replayed, and what is retained, checked."""
    replay, kept = _read_sets(config)
    for named in [*replay, *kept]:
        if not named.is_text:
            check_chat_template(tokenizer, str(directory))
        check_examples(named.rows, tokenizer, layout.sequence_length, layout.loss_on, named.path)
    return replay, kept


def _read_sets(config: RunConfig) -> tuple[list[NamedSet], list[NamedSet]]:
    return read_sets(_replay_sets(config), "replay.sets"), read_sets(config.retention.sets, "retention.sets")


def _hold_text_apart(
    text: TextTarget, data: TextDataConfig, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Apart, dict[str, Overlap]]:
    """What validates, and each retention set, beside what is trained on. Raises UserError where it must not be."""
    train, validation = compared_documents(text, data, tokenizer)
    as_corpus = as_corpora(tokenizer)
    replay, kept = _read_sets(config)
    apart = hold_apart(data, [train, *replayed(replay, as_corpus)], [validation, *retained(kept, as_corpus)])
    return apart, dict(zip(config.retention.sets, apart.overlaps[1:]))


def _bos_token(config: RunConfig, sets: list[NamedSet], tokenizer: PreTrainedTokenizerBase) -> str | None:
    raw_text = isinstance(config.task, PretrainConfig) or isinstance(config.replay, GeneratedReplayConfig)
    if not raw_text and not any(named.is_text for named in sets):
        return None
    bos_id = document_delimiters(tokenizer).bos_id
    return None if bos_id is None else str(tokenizer.convert_ids_to_tokens(bos_id))
