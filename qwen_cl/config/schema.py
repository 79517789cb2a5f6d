"""What a run consists of. Names and types live here; values live in conf/*.yaml and nowhere else.

Two mechanics of Hydra shape this file: cross-field rules sit in ``__post_init__`` because it runs only when the
composed config is turned into these objects, and a subclass is chosen by its group's ``..._schema`` entry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

from qwen_cl.config.dashboard_names import check_entity, check_project, check_run_name, check_tags
from qwen_cl.config.data import DataConfig, MockDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.forgetting import MixedReplayConfig, ReplayConfig, RetentionConfig
from qwen_cl.config.resume import ResumeConfig
from qwen_cl.config.rules import require
from qwen_cl.config.speed import SpeedConfig
from qwen_cl.config.tasks import TaskConfig, TrainingConfig


class Accelerator(str, Enum):
    auto = "auto"
    gpu = "gpu"
    cpu = "cpu"


class Precision(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class WandbMode(str, Enum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


class LogAdapter(str, Enum):
    none = "none"
    reference = "reference"
    upload = "upload"


class VerifyMode(str, Enum):
    auto = "auto"
    none = "none"
    logits = "logits"


COMMIT_REFERENCE = re.compile(r"hf://[\w.-]+/[\w.-]+@[0-9a-f]{40}")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    source: str
    """``hf://ORG/NAME[@REVISION]``, a directory in Hugging Face layout, or a NeMo 2.0 checkpoint (a directory, or
    ``nemo://PATH``)."""
    adapter: str | None
    """Directory of a LoRA in PEFT's format that is merged into the frozen model when it is read; None for the model as
    it is."""
    endpoint: str | None
    """URL of the Hub or a mirror of it; None for HF_ENDPOINT, and without that huggingface.co."""
    offline: bool
    """Take the model from the cache without one request."""
    cache: str | None
    """Directory the Hub's files are kept in; None for the Hub's own."""
    locked: bool
    """Refuse a source that does not name its commit."""
    verify: VerifyMode
    """Before the first step, the loss of a few rows must be the base model's. ``logits`` compares with transformers;
    ``auto`` does up to a billion parameters, and above only asks that it is not that of chance."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise UserError(
                "model.source is empty; write hf://ORG/NAME or the path of a directory in Hugging Face layout"
            )
        if self.locked and not COMMIT_REFERENCE.fullmatch(self.source):
            have = "names no commit" if self.source.startswith("hf://") else "is a directory, which has no commit"
            raise UserError(
                f"model.source ({self.source}) {have}, and model.locked=true takes nothing else; write "
                "hf://ORG/NAME@COMMIT with the 40 hex digits that a dry run without model.locked shows"
            )
        if self.adapter is not None and not self.adapter.strip():
            raise UserError("model.adapter is empty; name the directory of an adapter, or null for the model as it is")
        if self.cache is not None and not self.cache.strip():
            raise UserError("model.cache is empty; name a directory, or null for the Hub's own cache")
        if self.endpoint is not None:
            _require_endpoint(self.endpoint)


@dataclass(kw_only=True, slots=True)
class PeftConfig:
    default_lr: float
    """What ``lr`` is unless the user sets it."""


TARGET_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Megatron's four linear layers of a block; q, k and v are one of them, gate and up another."""


@dataclass(kw_only=True, slots=True)
class LoraConfig(PeftConfig):
    rank: int
    alpha: float
    """The update is scaled by alpha / rank."""
    dropout: float
    """Probability, on the adapter's input."""
    target_modules: list[str]

    def __post_init__(self) -> None:
        require("peft.rank", self.rank, at_least=1)
        require("peft.alpha", self.alpha, above=0)
        require("peft.dropout", self.dropout, at_least=0, below=1)
        unknown = [name for name in self.target_modules if name not in TARGET_MODULES]
        if unknown or not self.target_modules:
            raise UserError(
                f"peft.target_modules ({self.target_modules}) must name one or more of {', '.join(TARGET_MODULES)} "
                "(Megatron fuses q, k and v into linear_qkv, gate and up into linear_fc1)"
            )


@dataclass(kw_only=True, slots=True)
class DoraConfig(LoraConfig):
    """LoRA on the direction of each weight, with its magnitude trained beside it (arXiv 2402.09353)."""


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    accelerator: Accelerator
    devices: int
    """Processes per node: GPUs, or CPU processes."""
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    sequence_parallel: bool
    precision: Precision
    timeout_minutes: float
    """How long no rank may finish a step, or a part of what is measured, before the one that hangs is named."""

    def __post_init__(self) -> None:
        for name in ("devices", "tensor_parallel", "pipeline_parallel", "context_parallel"):
            require(f"cluster.{name}", getattr(self, name), at_least=1)
        require("cluster.timeout_minutes", self.timeout_minutes, above=0)
        if self.world_size % self.model_ranks:
            raise UserError(
                f"cluster.tensor_parallel ({self.tensor_parallel}) x cluster.pipeline_parallel "
                f"({self.pipeline_parallel}) x cluster.context_parallel ({self.context_parallel}) must divide the "
                f"number of processes ({self.world_size}); set cluster.devices to a multiple of {self.model_ranks}"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise UserError(
                "cluster.sequence_parallel (true) splits sequences over the tensor parallel ranks, and "
                "cluster.tensor_parallel is 1; raise it, or write cluster.sequence_parallel=false"
            )

    @property
    def world_size(self) -> int:
        return self.devices

    @property
    def data_parallel(self) -> int:
        return self.world_size // self.model_ranks

    @property
    def model_ranks(self) -> int:
        """Those that hold the model once, and share each sequence."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel


@dataclass(kw_only=True, slots=True)
class LocalConfig(ClusterConfig):
    """This machine."""


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    mode: WandbMode
    project: str
    entity: str | None
    tags: list[str]
    """Beside the model's, the adapter's and the data's name."""
    log_adapter: LogAdapter
    """Make the trained adapter an artifact: its place alone, or its files too."""

    def __post_init__(self) -> None:
        check_project(self.project)
        check_entity(self.entity)
        check_tags(self.tags)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    model: ModelConfig
    task: TaskConfig
    peft: PeftConfig
    data: DataConfig
    replay: ReplayConfig
    retention: RetentionConfig
    resume: ResumeConfig
    cluster: ClusterConfig
    speed: SpeedConfig
    wandb: WandbConfig
    lr: float
    """Peak learning rate; the only place it is set."""
    seed: int
    name: str | None
    """Name of the run on the dashboard; without it the task and the peft method."""
    dry_run: bool

    def __post_init__(self) -> None:
        require("lr", self.lr, above=0)
        require("seed", self.seed, at_least=0, at_most=2**31 - 1)
        check_run_name(self.name)
        if not isinstance(self.task, TrainingConfig):
            return
        rows, ranks = self.task.micro_batch_size, self.cluster.data_parallel
        per_pass = ranks if isinstance(rows, str) else rows * ranks
        if self.task.global_batch_size % per_pass:
            of = "" if isinstance(rows, str) else f"task.micro_batch_size ({rows}) x "
            raise UserError(
                f"task.global_batch_size ({self.task.global_batch_size}) must be a multiple of {of}data_parallel "
                f"({ranks}){f' = {per_pass}' if of else ''}"
            )
        if isinstance(self.replay, MixedReplayConfig) and isinstance(self.data, MockDataConfig):
            raise UserError(
                f"replay.share ({self.replay.share:g}) would change nothing with data=mock, which is random tokens "
                "alone; write replay=none, or choose other data"
            )

    @property
    def training(self) -> TrainingConfig:
        """The task of a run that trains, which is all that plans and recipes are made for."""
        assert isinstance(self.task, TrainingConfig)
        return self.task


def _require_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise UserError(f"model.endpoint ({endpoint}) must be a URL such as https://hub.example.org/mirror")
    if "@" in parts.netloc:
        raise UserError(
            "model.endpoint must not hold a user or password: it is recorded; use `hf auth login` or HF_TOKEN"
        )
