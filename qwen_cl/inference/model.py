"""The transformers model in memory, filled tensor by tensor; nothing is written to disk."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from qwen_cl.config.cluster import Accelerator, ClusterConfig, Precision
from qwen_cl.inference.target_model import TargetModel
from qwen_cl.inference.trained_run import import_quietly, open_trained
from qwen_cl.models.normalized import transformers_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TensorReader(Protocol):
    """A function that reads a model's tensor by its name in transformers."""

    def __call__(self, name: str) -> torch.Tensor: ...


@torch.no_grad()
def load_model(target: TargetModel, cluster: ClusterConfig) -> PreTrainedModel:
    """Load a model in evaluation mode, on the accelerator and in the precision of ``cluster``.

    Takes the memory of the model and of one more tensor. In fp32 a merged adapter is exact; in bf16 the merged weights
    are rounded once, as in an export.

    Raises:
        UserError: the run's checkpoint cannot be read, or belongs to another model.
    """
    dtype = torch.float32 if cluster.precision is Precision.fp32 else torch.bfloat16
    device = "cpu" if cluster.accelerator is Accelerator.cpu else "cuda"
    read = _tensors(target, dtype)
    model = _empty_model(target, dtype, device)
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    return model.eval()


def _tensors(target: TargetModel, dtype: torch.dtype) -> TensorReader:
    if target.run is not None:
        trained = open_trained(target.run, target.directory)
        from qwen_cl.models.export.merged import MergedModel

        return MergedModel(trained, dtype).read
    import_quietly()
    from qwen_cl.models.loading.base_tensors import open_tensors

    assert target.directory is not None
    tensors = open_tensors(target.directory, target.architecture, target.adapter)
    return lambda name: tensors.read(name, slice(None))


def _empty_model(target: TargetModel, dtype: torch.dtype, device: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = transformers_config(target.config)
    with torch.device(device), _no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    if (Path(target.small_files) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(target.small_files)
    return model


def _no_init_weights() -> AbstractContextManager[None]:
    try:
        from transformers.initialization import no_init_weights  # transformers 5
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    manager: AbstractContextManager[None] = no_init_weights()
    return manager
