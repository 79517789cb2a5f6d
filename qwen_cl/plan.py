"""Everything about a run that can be known and refused before anything heavy starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_cl.config.errors import UserError
from qwen_cl.config.forgetting import FileReplayConfig, ReplayConfig
from qwen_cl.config.schema import RunConfig
from qwen_cl.config.tasks import FinetuneConfig, LossOn
from qwen_cl.data.examples import check_chat_template, check_examples, load_tokenizer
from qwen_cl.data.named_sets import absolute_sets, read_sets
from qwen_cl.data.rows import RowFiles, content_hash, read_rows, row_files
from qwen_cl.devices import Device, pick_device
from qwen_cl.layout import check_layout
from qwen_cl.source.architecture import Architecture, read_architecture
from qwen_cl.source.checkpoint import check_tensors
from qwen_cl.source.nemo_checkpoint import check_nemo_tensors
from qwen_cl.source.nemo_context import is_nemo_checkpoint, tokenizer_directory
from qwen_cl.source.reference import ModelFiles, resolve
from qwen_cl.source.settings import HubSettings


@dataclass(frozen=True, slots=True)
class Plan:
    config: RunConfig
    """With model.source pinned, model.cache absolute, and accelerator and precision settled."""
    model: ModelFiles
    architecture: Architecture
    device: Device
    files: RowFiles | None
    data_hash: str | None
    """sha256 of the data files; None for random tokens."""

    @property
    def tokens_per_step(self) -> int:
        """At most: padding and short rows make it less."""
        return self.config.training.global_batch_size * self.config.training.sequence_length


def make_plan(config: RunConfig) -> Plan:
    """Settle what is open in the config and check the rest, cheapest first.

    Fetches the model's small files, not its weights.

    Raises:
        UserError: the run could not work, with what to change.
    """
    device = pick_device(config.cluster)
    settings = HubSettings.of(config.model)
    model = resolve(config.model.source, settings, weights=False)
    architecture = read_architecture(model.config, model.directory)
    check_layout(config.cluster.tensor_parallel, config.cluster.pipeline_parallel, architecture)
    _check_sequence_length(config, architecture)
    if model.commit is None:
        check_weights(model, architecture)
    files = row_files(config.data, config.training)
    _check_data(config, model, files)
    settled = replace(
        config,
        model=replace(
            config.model,
            source=model.source,
            cache=None if config.model.cache is None else str(settings.cache_directory),
        ),
        replay=_with_absolute_paths(config.replay),
        retention=replace(config.retention, sets=absolute_sets(config.retention.sets)),
        cluster=replace(config.cluster, accelerator=device.kind, precision=device.precision),
    )
    return Plan(settled, model, architecture, device, files, content_hash(files) if files else None)


def _with_absolute_paths(replay: ReplayConfig) -> ReplayConfig:
    """The worker runs elsewhere."""
    return replace(replay, sets=absolute_sets(replay.sets)) if isinstance(replay, FileReplayConfig) else replay


def fetch_weights(plan: Plan) -> None:
    """Make the weights present and check that they are this architecture's."""
    check_weights(resolve(plan.model.source, HubSettings.of(plan.config.model)), plan.architecture)


def check_weights(model: ModelFiles, architecture: Architecture) -> None:
    """Raises UserError where the files' own lists of tensors are not this architecture's."""
    check = check_nemo_tensors if is_nemo_checkpoint(model.directory) else check_tensors
    check(model.directory, architecture)


def _check_sequence_length(config: RunConfig, architecture: Architecture) -> None:
    if config.training.sequence_length > architecture.longest_sequence:
        limit = "sliding_window" if architecture.sliding_window else "max_position_embeddings"
        raise UserError(
            f"task.sequence_length ({config.training.sequence_length}) must be at most the model's "
            f"{limit} ({architecture.longest_sequence})"
        )


def _check_data(config: RunConfig, model: ModelFiles, files: RowFiles | None) -> None:
    if files is None:
        return
    train, validation = read_rows(files)
    directory = tokenizer_directory(model.directory)
    tokenizer = load_tokenizer(str(directory))
    if isinstance(config.task, FinetuneConfig):
        check_chat_template(tokenizer, str(directory))
    largest = max(tokenizer.get_vocab().values())
    if largest >= int(model.config["vocab_size"]):
        raise UserError(
            f"{directory}: its tokenizer has id {largest}, past the model's vocab_size "
            f"({model.config['vocab_size']}); tokenizer and weights are not of the same model"
        )
    loss_on = config.task.loss_on if isinstance(config.task, FinetuneConfig) else LossOn.all
    for rows, path in ((train, files.train), (validation, files.validation or files.train)):
        check_examples(rows, tokenizer, config.training.sequence_length, loss_on, path)
    replay = config.replay.sets if isinstance(config.replay, FileReplayConfig) else {}
    for named in [*read_sets(replay, "replay.sets"), *read_sets(config.retention.sets, "retention.sets")]:
        if not named.is_text:
            check_chat_template(tokenizer, str(directory))
        check_examples(named.rows, tokenizer, config.training.sequence_length, loss_on, str(named.path))
