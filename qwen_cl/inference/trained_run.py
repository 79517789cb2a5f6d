"""A run that trained, found again by its folder, with the base it was trained from. No torch until it is opened."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_cl.config.errors import UserError
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

HUB_KEYS = ("model.endpoint", "model.offline", "model.cache")
"""What may be said of a run's model afterwards."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run as its folder tells it."""

    folder: RunFolder
    config: RunConfig
    status: RunStatus
    step: int
    weights: Path
    """The distributed checkpoint of that step."""

    @property
    def small_files(self) -> Path:
        """The model's own, as its author wrote them; runs of earlier versions kept no others."""
        kept = self.folder.model_files
        return kept if kept.is_dir() else self.folder.tokenizer


def find_run(directory: str, step: int | None) -> Run:
    """``task.run`` and ``task.step``; without a step the newest checkpoint.

    Raises:
        UserError: it is no run's folder, or has no such checkpoint that is whole and what was saved.
    """
    folder = RunFolder(os.path.expanduser(directory))  # noqa: PTH111 - Path's raises on an unknown user
    if not folder.config.is_file():
        raise UserError(f"task.run ({folder.directory}) is not the folder of a run: it has no config.yaml")
    config = _run_config(folder)
    whole = {checkpoint.step: checkpoint for checkpoint in complete_checkpoints(folder.checkpoints)}
    if not whole:
        raise UserError(f"task.run ({folder.directory}) has no whole checkpoint in checkpoints/")
    step = max(whole) if step is None else step
    if step not in whole:
        there = ", ".join(map(str, sorted(whole)))
        raise UserError(f"task.step ({step}) has no whole checkpoint in {folder.checkpoints}; there are {there}")
    try:
        verify(whole[step].path)
    except DamagedCheckpointError as error:
        raise UserError(
            f"{whole[step].path} is damaged: {error}; put the file back, or choose another task.step"
        ) from error
    return Run(folder, config, folder.status(), step, whole[step].weights)


def with_hub_settings(run: Run, now: ModelConfig) -> Run:
    """The base comes from where the run had it, unless the user says otherwise now."""
    then = run.config.model
    model = replace(
        then,
        endpoint=now.endpoint or then.endpoint,
        offline=now.offline or then.offline,
        cache=now.cache or then.cache,
    )
    return replace(run, config=replace(run.config, model=model))


def find_base(run: Run, fix: str = "") -> Path:
    """The base model's directory, its weights present. ``fix`` is what else than putting it back would help.

    Raises:
        UserError: it is out of reach, or not what the run was trained from.
    """
    source = run.config.model.source
    if is_hub_reference(source):
        return resolve(source, HubSettings.of(run.config.model)).directory
    if not Path(source).is_dir():
        raise UserError(f"the base model of this run, {source}, is gone; put it back{fix}")
    recorded = run.status.model_fingerprint
    if recorded is None:
        print(f"note: this run did not record what {source} held; it is taken to be unchanged")
    elif fingerprint(Path(source)) != recorded:
        raise UserError(
            f"the base model of this run, {source}, has changed since: run and base no longer fit each "
            f"other; put it back{fix}"
        )
    return Path(source)


def find_base_adapter(run: Run, architecture: Architecture) -> BaseAdapter | None:
    """What was merged into the base of this run; None where nothing was.

    Raises:
        UserError: it is gone, or not what the run was trained on.
    """
    source = run.config.model.adapter
    if source is not None and not Path(source).is_dir():
        raise UserError(f"the adapter that this run merged into its base, {source}, is gone; put it back")
    adapter = find_adapter(source, run.small_files, architecture)
    if adapter is not None and adapter.sha256 != run.status.model_adapter_sha256:
        raise UserError(
            f"the adapter that this run merged into its base, {source}, has changed since: run and base no longer fit "
            "each other; put it back"
        )
    return adapter


def import_quietly() -> None:
    """torch, and Megatron with what reads tensors through it: what they say of themselves meanwhile is no news to a
    user."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from qwen_cl.patches.imports import import_megatron

        import_megatron()
        import qwen_cl.models.export.merged  # noqa: F401


def open_trained(run: Run, base: Path | None) -> TrainedModel:
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
        raise UserError(f"{folder.config} is of no run that trains")
    return config
