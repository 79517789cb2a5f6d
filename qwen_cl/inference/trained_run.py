"""A finished or interrupted training run, read from its folder, with its base model. torch is imported when opened."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Scope, keys_of
from qwen_cl.config.model import ModelConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import read_run_config
from qwen_cl.config.task.training import TrainingConfig
from qwen_cl.models.adapter_methods import adapter_of
from qwen_cl.models.architecture import Architecture
from qwen_cl.models.fingerprint import fingerprint
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.loading.base_adapter import BaseAdapter, find_adapter
from qwen_cl.models.reference import is_hub_reference, read_model_config, resolve
from qwen_cl.runs.checkpoints import complete_checkpoints
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.manifest import DamagedCheckpointError, verify
from qwen_cl.runs.status import RunStatus

if TYPE_CHECKING:
    from qwen_cl.models.export.merged import TrainedModel


@dataclass(frozen=True, slots=True)
class Run:
    """A training run, and one of its checkpoints."""

    folder: RunFolder
    config: RunConfig
    status: RunStatus
    step: int
    weights: Path
    """The distributed checkpoint of that step."""

    @property
    def small_files(self) -> Path:
        """Directory of the base model's config and tokenizer files; runs of earlier versions have the tokenizer's."""
        files = self.folder.model_files
        return files if files.is_dir() else self.folder.tokenizer


def find_run(directory: str, step: int | None) -> Run:
    """Find the run of ``task.run`` and its checkpoint of ``task.step``, or the newest without a step.

    Raises:
        UserError: it is not the folder of a run, or the checkpoint is missing, incomplete or corrupted.
    """
    folder = RunFolder(os.path.expanduser(directory))  # noqa: PTH111 - Path's raises on an unknown user
    if not folder.config.is_file():
        raise UserError(f"task.run ({folder.directory}) is not the folder of a run: it has no config.yaml")
    config = _run_config(folder)
    complete = {checkpoint.step: checkpoint for checkpoint in complete_checkpoints(folder.checkpoints)}
    if not complete:
        raise UserError(f"task.run ({folder.directory}) has no complete checkpoint in checkpoints/")
    step = max(complete) if step is None else step
    if step not in complete:
        existing = ", ".join(map(str, sorted(complete)))
        raise UserError(f"task.step ({step}) has no complete checkpoint in {folder.checkpoints}; there are {existing}")
    checkpoint = complete[step]
    try:
        verify(checkpoint.path)
    except DamagedCheckpointError as error:
        raise UserError(
            f"{checkpoint.path} is corrupted: {error}; restore the file, or choose another task.step"
        ) from error
    return Run(folder, config, folder.status(), step, checkpoint.weights)


def with_hub_settings(run: Run, now: ModelConfig) -> Run:
    """Return the run with the Hub settings of ``now`` where they are set."""
    recorded = run.config.model
    names = [key.removeprefix("model.") for key in keys_of(Scope.access)]
    model = replace(recorded, **{name: getattr(now, name) or getattr(recorded, name) for name in names})
    return replace(run, config=replace(run.config, model=model))


def find_base(run: Run, fix: str = "") -> Path:
    """Return the directory of the run's base model, with its weights present.

    ``fix`` completes the advice of the error message with an alternative to restoring the model.

    Raises:
        UserError: the model is missing, or has changed since the run.
    """
    source = run.config.model.source
    if is_hub_reference(source):
        return resolve(source, HubSettings.of(run.config.model)).directory
    if not Path(source).is_dir():
        raise UserError(f"the base model of this run, {source}, is missing; restore it{fix}")
    recorded = run.status.model_fingerprint
    if recorded is None:
        print(f"note: this run did not record a fingerprint of {source}; it is assumed to be unchanged")
    elif fingerprint(Path(source)) != recorded:
        raise UserError(
            f"the base model of this run, {source}, has changed since the run, and its weights no longer match; "
            f"restore it{fix}"
        )
    return Path(source)


def find_base_adapter(run: Run, architecture: Architecture) -> BaseAdapter | None:
    """Return the adapter that was merged into the base of this run, or None.

    Raises:
        UserError: the adapter is missing, or has changed since the run.
    """
    source = run.config.model.adapter
    if source is not None and not Path(source).is_dir():
        raise UserError(f"the adapter that this run merged into its base, {source}, is missing; restore it")
    adapter = find_adapter(source, run.small_files, architecture)
    if adapter is not None and adapter.sha256 != run.status.model_adapter_sha256:
        raise UserError(
            f"the adapter that this run merged into its base, {source}, has changed since the run, and its weights no "
            "longer match; restore it"
        )
    return adapter


def import_quietly() -> None:
    """Import torch, Megatron and the tensor readers, without their warnings, which a user can do nothing about."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from qwen_cl.patches.imports import import_megatron

        import_megatron()
        import qwen_cl.models.export.merged  # noqa: F401


def open_trained(run: Run, base: Path | None) -> TrainedModel:
    """Open the weights of a run; ``base`` is the base model's directory, or None if it is not needed."""
    import_quietly()
    from qwen_cl.models.architecture import read_architecture
    from qwen_cl.models.export.merged import TrainedModel
    from qwen_cl.models.formats.torch_dist import DistributedWeights

    adapter = adapter_of(run.config.peft)
    architecture = read_architecture(read_model_config(run.folder.tokenizer), run.folder.tokenizer)
    return TrainedModel(
        weights=DistributedWeights(run.weights),
        source=run.config.model.source,
        base=base,
        small_files=run.small_files,
        architecture=architecture,
        adapter=adapter,
        base_adapter=None if adapter is None else find_base_adapter(run, architecture),
        tensor_parallel=run.config.cluster.tensor_parallel,
    )


def _run_config(folder: RunFolder) -> RunConfig:
    config = read_run_config(folder.config)
    if not isinstance(config.task, TrainingConfig):
        raise UserError(f"{folder.config} is not the config of a training run")
    return config
