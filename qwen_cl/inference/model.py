"""A model in memory as transformers has it, filled tensor by tensor: nothing is written."""

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


class Tensors(Protocol):
    def __call__(self, name: str) -> torch.Tensor: ...


@torch.no_grad()
def load_model(subject: TargetModel, cluster: ClusterConfig) -> PreTrainedModel:
    """In evaluation mode, on the device and in the precision that ``cluster`` has settled.

    Needs the model once, and one tensor of it at a time beside that. In fp32 a merged adapter is exact; in bf16 its
    weights are rounded once, as an export's are.

    Raises:
        UserError: the run's checkpoint cannot be read, or is not of this model.
    """
    dtype = torch.float32 if cluster.precision is Precision.fp32 else torch.bfloat16
    device = "cpu" if cluster.accelerator is Accelerator.cpu else "cuda"
    read = _tensors(subject, dtype)
    model = _empty_model(subject, dtype, device)
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    return model.eval()


def _tensors(subject: TargetModel, dtype: torch.dtype) -> Tensors:
    if subject.run is not None:
        trained = open_trained(subject.run, subject.directory)
        from qwen_cl.models.export.merged import MergedModel

        return MergedModel(trained, dtype).read
    import_quietly()
    from qwen_cl.models.loading.base_tensors import open_tensors

    assert subject.directory is not None
    tensors = open_tensors(subject.directory, subject.architecture, subject.adapter)
    return lambda name: tensors.read(name, slice(None))


def _empty_model(subject: TargetModel, dtype: torch.dtype, device: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = transformers_config(subject.config)
    with torch.device(device), _no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    if (Path(subject.small_files) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(subject.small_files)
    return model


def _no_init_weights() -> AbstractContextManager[None]:
    try:
        from transformers.initialization import no_init_weights  # transformers 5
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    manager: AbstractContextManager[None] = no_init_weights()
    return manager
