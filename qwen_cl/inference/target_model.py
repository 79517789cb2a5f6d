"""The model to evaluate, or to generate with: checked by the launcher, loaded by the child process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.data import ChatDataConfig, DataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Scope, keys_of
from qwen_cl.config.model import ModelConfig
from qwen_cl.config.overrides import refuse_ignored
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.inference import AnswersConfig
from qwen_cl.data.chat.settings import today
from qwen_cl.files.atomic_folder import require_room
from qwen_cl.inference.trained_run import Run, find_base, find_run, with_hub_settings
from qwen_cl.models.adapter_methods import adapter_of
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.formats.nemo_layout import tokenizer_directory
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.loading.base_adapter import BaseAdapter, find_adapter
from qwen_cl.models.normalized import normalized_config
from qwen_cl.models.reference import read_model_config, resolve
from qwen_cl.planning.devices import pick_device, single_process
from qwen_cl.planning.plan import check_weights
from qwen_cl.runs.status import State

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TargetModel:
    """A model to evaluate or to generate with: a pretrained model, or the result of a run."""

    run: Run | None
    """The run that trained it; None for a pretrained model."""
    directory: Path | None
    """Directory of the model, or of the run's base model; None after full fine-tuning, which needs no base."""
    small_files: Path
    """Directory of config, generation config (Hugging Face layout) and tokenizer; a NeMo checkpoint has no other."""
    config: dict[str, Any]
    """The model's config.json, normalized."""
    architecture: Architecture
    label: str
    """Name for messages and reports."""
    data: DataConfig
    """Chat settings: the run's, or those of the command line; the template date is resolved."""
    adapter: BaseAdapter | None = None
    """Adapter to merge into a pretrained model (``model.adapter``); a run's own is read from its config."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, with the chat settings of ``data``."""
        from qwen_cl.data.chat.encode import use_chat_settings
        from qwen_cl.data.chat.settings import chat_settings
        from qwen_cl.data.examples import load_data_tokenizer

        settings = chat_settings(self.data, from_run=self.run is not None)
        return use_chat_settings(load_data_tokenizer(str(self.small_files)), settings)


def resolve_target(config: RunConfig, task: AnswersConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the config with accelerator and precision resolved, after checking the user's overrides.

    Raises:
        UserError: a key would be ignored, or the device is not available.
    """
    if task.run is None:
        reason = "nothing is trained; set model, task, cluster.accelerator, cluster.precision or seed"
        accepted = (*keys_of(Scope.inference, Scope.rendering), "dry_run", "model", "experiment")
    else:
        reason = "with task.run the model is the one of the run"
        accepted = (*keys_of(Scope.inference, Scope.access), "dry_run")
    refuse_ignored(overrides, accepted, reason)
    device = pick_device(single_process(config.cluster))
    return replace(config, cluster=replace(config.cluster, accelerator=device.kind, precision=device.precision))


def find_target_model(config: RunConfig, task: AnswersConfig) -> TargetModel:
    """Find the model of ``model`` or ``task.run``, and download its weights if they are missing.

    Raises:
        UserError: the model, the run or the run's base model is missing or invalid.
    """
    if task.run is None:
        return find_pretrained_model(config.model, config.data)
    return find_trained_model(with_hub_settings(find_run(task.run, task.step), config.model))


def find_pretrained_model(model: ModelConfig, data: DataConfig) -> TargetModel:
    """Find a pretrained model. ``data`` has the chat settings."""
    files = resolve(model.source, HubSettings.of(model))
    architecture = read_architecture(files.config, files.directory)
    check_weights(files, architecture)
    small_files = tokenizer_directory(files.directory)
    config = normalized_config(files.config, architecture)
    adapter = find_adapter(model.adapter, files.directory, architecture)
    if isinstance(data, ChatDataConfig) and data.template_date is None:
        data = replace(data, template_date=today())
    return TargetModel(None, files.directory, small_files, config, architecture, files.source, data, adapter)


def find_trained_model(run: Run) -> TargetModel:
    """Find the model that a run trained, and its base model if it is needed."""
    base = None if adapter_of(run.config.peft) is None else find_base(run)
    small_files = run.folder.tokenizer
    config = read_model_config(small_files)
    state = run.status.state
    note = "" if state is State.COMPLETED else f" of a run that is {state or 'without a status'}"
    label = f"step {run.step}{note}, {run.folder.directory}, trained from {run.config.model.source}"
    if run.config.model.adapter is not None:
        label += f" with {run.config.model.adapter} merged in"
    architecture = read_architecture(config, small_files)
    normalized = normalized_config(config, architecture)
    return TargetModel(run, base, small_files, normalized, architecture, label, run.config.data)


def require_length(sequence_length: int, architecture: Architecture) -> None:
    """Refuse a ``task.sequence_length`` above the model's longest sequence."""
    if sequence_length > architecture.longest_sequence:
        raise UserError(
            f"task.sequence_length ({sequence_length}) must be at most the model's longest sequence "
            f"({architecture.longest_sequence})"
        )


def pinned(config: RunConfig, task: AnswersConfig, target: TargetModel) -> RunConfig:
    """Return the config with the commit or step that was checked, so that the child process loads the same."""
    if target.run is None:
        return replace(config, model=replace(config.model, source=target.label), data=target.data)
    return replace(config, model=target.run.config.model, task=replace(task, step=target.run.step))


def output_file(task: AnswersConfig) -> Path | None:
    """Return the absolute path of ``task.output``, or None.

    Raises:
        UserError: the file exists, or its folder cannot be written to.
    """
    if task.output is None:
        return None
    output = Path(os.path.expanduser(task.output)).absolute()  # noqa: PTH111 - Path's raises on an unknown user
    if os.path.lexists(output):
        raise UserError(f"task.output ({output}) exists; choose another file, or remove it first")
    require_room("task.output", output, 0)
    return output
