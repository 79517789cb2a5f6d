"""Everything about a run that can be known and refused before anything heavy starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qwen_cl.config.cluster import Accelerator, LocalConfig
from qwen_cl.config.data import MockDataConfig, TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.run import RunConfig
from qwen_cl.data.chat.settings import with_template_date
from qwen_cl.data.corpus.statistics import describe_corpus
from qwen_cl.data.corpus.text_dataset import TextTarget, prepare_target, resolve_separator, text_content
from qwen_cl.data.rows import RowFiles, content_hash, pin_rows, row_files
from qwen_cl.data.statistics import DataReport
from qwen_cl.models.adapter_methods import adapter_of
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.formats.nemo_layout import is_nemo_checkpoint, tokenizer_directory
from qwen_cl.models.formats.nemo_weights import check_nemo_tensors
from qwen_cl.models.formats.safetensors import check_tensors
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.loading.base_adapter import BaseAdapter, find_adapter, other_base
from qwen_cl.models.reference import ModelFiles, resolve
from qwen_cl.models.tokenizer_checks import tokenizer_hash
from qwen_cl.patches.registry import UpstreamChanged, check_installed
from qwen_cl.planning.data import (
    ReadData,
    check_text_leakage,
    data_hash,
    load_chat_tokenizer,
    read_data,
    read_other_sets,
    resolve_run_template_date,
    row_layout,
    unused_in_sets,
    with_local_sets,
)
from qwen_cl.planning.devices import Device, pick_device
from qwen_cl.planning.micro_batch import is_automatic, resolve_for_device
from qwen_cl.planning.parallelism import check_layout
from qwen_cl.runs.manifest import MANIFEST, DamagedCheckpointError, verify

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
    """Raw text once it is tokenized."""
    data_hash: str | None
    """sha256 of all that is trained on and measured; None for random tokens, and before raw text is tokenized."""
    data_report: DataReport | None
    """None for random tokens, and before raw text is tokenized."""
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
        """Hash of the data as it is now, also of raw text that is not tokenized yet."""
        data = self.config.data
        return data_hash(text_content(data), self.config) if isinstance(data, TextDataConfig) else self.data_hash


class Memo:
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


def make_plan(config: RunConfig, once: Memo | None = None, run_date: str | None = None) -> Plan:
    """Settle what is open in the config and check the rest, cheapest first.

    Fetches the model's small files, not its weights. ``run_date`` is the day that the run was made on, if it is not
    today.

    Raises:
        UserError: the run could not work, with what to change.
    """
    once = once or Memo()
    said = config
    device = once(lambda: pick_device(said.cluster), "device", said.cluster)
    if isinstance(said.cluster, LocalConfig):  # another machine has its own packages, which its ranks check
        _check_upstream(device)
    settings = HubSettings.of(config.model)
    model = once(lambda: resolve(said.model.source, settings, weights=False), "model", said.model)
    architecture = read_architecture(model.config, model.directory)
    adapter = once(lambda: _adapter(said, model, architecture), "adapter", said.model, said.peft)
    check_layout(config.cluster, config.peft, architecture)
    _check_sequence_length(config, architecture)
    if model.commit is None:
        once(lambda: check_weights(model, architecture), "weights", said.model)
    sets = once(lambda: with_local_sets(said), "sets", said.replay, said.retention)
    data = once(lambda: pin_rows(said.data), "rows", said.data)
    config = replace(config, data=data, replay=sets.replay, retention=sets.retention)
    config = resolve_for_device(config, architecture, device)
    if isinstance(config.data, TextDataConfig):
        config = replace(config, data=resolve_separator(config.data))
    on_day = (said.model, said.data, said.replay, said.retention, type(said.task), run_date)
    day = once(lambda: resolve_run_template_date(said, model, run_date), "template date", on_day)
    config = replace(config, data=with_template_date(config.data, day))
    files = row_files(config.data, config.training)
    read = config
    on = (said.model, config.data, config.replay, config.retention, row_layout(config), type(config.task))
    found = ReadData()
    if not isinstance(config.data, MockDataConfig):
        found = once(lambda: read_data(read, model, files), "data", on)
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


def with_text(plan: Plan, data: TextDataConfig) -> Plan:
    """Tokenizes the raw text, which may take a while: not for a dry run.

    Raises:
        UserError: the text cannot be trained on.
    """
    tokenizer = load_chat_tokenizer(plan.config, tokenizer_directory(plan.model.directory))
    text = prepare_target(data, plan.config.seed, tokenizer, plan.architecture.vocab_size)
    leakage, kept = check_text_leakage(text, data, plan.config, tokenizer)
    text = text.with_moved(leakage.moved)
    replay, retention = read_other_sets(plan.config)
    report = replace(
        describe_corpus(text, tokenizer, row_layout(plan.config), leakage.overlaps[0], kept),
        near_duplicates=leakage.near,
        unused_fields=unused_in_sets(replay, retention, tokenizer),
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
    trained = adapter_of(config.peft)
    if trained is not None and trained.entry.not_on_adapter is not None:
        raise UserError(
            f"peft={trained.method} with model.adapter is not supported: {trained.entry.not_on_adapter}. Write "
            "peft=lora, or export the first run merged and name that as model.source"
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


def _check_upstream(device: Device) -> None:
    try:
        check_installed(cpu=device.kind is Accelerator.cpu)
    except UpstreamChanged as error:
        raise UserError(str(error)) from error


def _check_sequence_length(config: RunConfig, architecture: Architecture) -> None:
    if config.training.sequence_length > architecture.longest_sequence:
        limit = "sliding_window" if architecture.sliding_window else "max_position_embeddings"
        raise UserError(
            f"task.sequence_length ({config.training.sequence_length}) must be at most the model's "
            f"{limit} ({architecture.longest_sequence})"
        )
