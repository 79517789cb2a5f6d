"""The plan of a run: everything that can be resolved and checked before it starts."""

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
    """A resolved and checked run."""

    config: RunConfig
    """Config with model.source and datasets pinned, model.cache absolute, and accelerator, precision, micro batch and
    speed resolved."""
    model: ModelFiles
    architecture: Architecture
    device: Device
    files: RowFiles | None
    text: TextTarget | None
    """Raw text; None until it is tokenized."""
    data_hash: str | None
    """sha256 of the training and evaluation data; None for random tokens, and before raw text is tokenized."""
    data_report: DataReport | None
    """Data report; None for random tokens, and before raw text is tokenized."""
    tokenizer_hash: str | None
    adapter: BaseAdapter | None
    """Adapter merged into the frozen base model, or None."""
    bos_token: str | None
    """BOS token of raw text documents; None if the tokenizer adds none, or there are none."""
    automatic_micro_batch: bool
    """The micro batch was resolved from this machine's memory."""

    @property
    def tokens_per_step(self) -> int:
        """The maximum number of tokens per step; padding and short rows reduce it."""
        return self.config.training.global_batch_size * self.config.training.sequence_length

    def content(self) -> str | None:
        """Return the hash of the current data, also of raw text that is not tokenized yet."""
        data = self.config.data
        return data_hash(text_content(data), self.config) if isinstance(data, TextDataConfig) else self.data_hash


class Memo:
    """A cache of intermediate results shared by several plans, as reading data and Hub requests are slow."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, make: Callable[[], T], *on: Any) -> T:
        """Return the cached result of ``make``; ``on`` are all values that it depends on, identified by their repr."""
        key = repr(on)
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


def make_plan(config: RunConfig, memo: Memo | None = None, run_date: str | None = None) -> Plan:
    """Resolve the open values of the config and check the others, cheapest first.

    Fetches the model's small files, not its weights. ``run_date`` is the date of the original run, if not today.

    Raises:
        UserError: the run cannot work; says what to change.
    """
    memo = memo or Memo()
    requested = config
    device = memo(lambda: pick_device(requested.cluster), "device", requested.cluster)
    if isinstance(requested.cluster, LocalConfig):  # another machine has its own packages, which its ranks check
        _check_upstream(device)
    settings = HubSettings.of(config.model)
    model = memo(lambda: resolve(requested.model.source, settings, weights=False), "model", requested.model)
    architecture = read_architecture(model.config, model.directory)
    adapter = memo(lambda: _adapter(requested, model, architecture), "adapter", requested.model, requested.peft)
    check_layout(config.cluster, config.peft, architecture)
    _check_sequence_length(config, architecture)
    if model.commit is None:
        memo(lambda: check_weights(model, architecture), "weights", requested.model)
    sets = memo(lambda: with_local_sets(requested), "sets", requested.replay, requested.retention)
    data = memo(lambda: pin_rows(requested.data), "rows", requested.data)
    config = replace(config, data=data, replay=sets.replay, retention=sets.retention)
    config = resolve_for_device(config, architecture, device)
    if isinstance(config.data, TextDataConfig):
        config = replace(config, data=resolve_separator(config.data))
    on_day = (requested.model, requested.data, requested.replay, requested.retention, type(requested.task), run_date)
    day = memo(lambda: resolve_run_template_date(requested, model, run_date), "template date", on_day)
    config = replace(config, data=with_template_date(config.data, day))
    files = row_files(config.data, config.training)
    read = config
    on = (requested.model, config.data, config.replay, config.retention, row_layout(config), type(config.task))
    found = ReadData()
    if not isinstance(config.data, MockDataConfig):
        found = memo(lambda: read_data(read, model, files), "data", on)
    resolved = replace(
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
        config=resolved,
        model=model,
        architecture=architecture,
        device=device,
        files=None if files is None else replace(files, moved=found.moved),
        text=None,
        data_hash=memo(lambda: data_hash(content_hash(files), read), "hash", files, on) if files else None,
        data_report=found.report,
        tokenizer_hash=tokenizer_hash(tokenizer_directory(model.directory)),
        adapter=adapter,
        bos_token=found.bos_token,
        automatic_micro_batch=is_automatic(requested),
    )


def with_text(plan: Plan, data: TextDataConfig) -> Plan:
    """Add the tokenized raw text to the plan. May be slow, so not for a dry run.

    Raises:
        UserError: the text cannot be trained on.
    """
    tokenizer = load_chat_tokenizer(plan.config, tokenizer_directory(plan.model.directory))
    text = prepare_target(data, plan.config.seed, tokenizer, plan.architecture.vocab_size)
    leakage, retention_overlaps = check_text_leakage(text, data, plan.config, tokenizer)
    text = text.with_moved(leakage.moved)
    replay, retention = read_other_sets(plan.config)
    report = replace(
        describe_corpus(text, tokenizer, row_layout(plan.config), leakage.overlaps[0], retention_overlaps),
        near_duplicates=leakage.near,
        unused_fields=unused_in_sets(replay, retention, tokenizer),
    )
    return replace(plan, text=text, data_report=report, data_hash=data_hash(text.content, plan.config))


def fetch_weights(plan: Plan) -> Plan:
    """Fetch and check the weights; only they tell if the output layer is tied to the embedding."""
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
            f"note: model.adapter ({adapter.directory}) was trained on {other}, and is merged into "
            f"{model.source}, as its shapes match",
            file=sys.stderr,
        )
    return adapter


def check_weights(model: ModelFiles, architecture: Architecture) -> None:
    """Check that the tensors in the files are those of the architecture. Raises UserError."""
    if (model.directory / MANIFEST).is_file():  # a checkpoint of qwen_cl
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
