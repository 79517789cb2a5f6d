"""The config of a run. Names and types are defined here; values only in conf/*.yaml.

Two mechanics of Hydra shape this file: cross-field rules sit in ``__post_init__`` because it runs only when the
composed config is turned into these objects, and a subclass is chosen by its group's ``..._schema`` entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_cl.config.cluster import ClusterConfig
from qwen_cl.config.data import DataConfig, MockDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Affects, Scope, setting
from qwen_cl.config.model import ModelConfig
from qwen_cl.config.peft import PeftConfig
from qwen_cl.config.replay import MixedReplayConfig, ReplayConfig, RetentionConfig
from qwen_cl.config.resume import ResumeConfig
from qwen_cl.config.speed import SpeedConfig
from qwen_cl.config.task.training import TaskConfig, TrainingConfig
from qwen_cl.config.validation import require
from qwen_cl.config.wandb import WandbConfig
from qwen_cl.config.wandb_names import check_run_name


@dataclass(kw_only=True, slots=True)
class RunConfig:
    model: ModelConfig
    task: TaskConfig = field(metadata=setting(Affects.checkpoint, scope=Scope.command))
    peft: PeftConfig = field(metadata=setting(Affects.checkpoint))
    data: DataConfig
    replay: ReplayConfig
    retention: RetentionConfig
    resume: ResumeConfig = field(metadata=setting(Affects.nothing))
    cluster: ClusterConfig = field(metadata=setting(Affects.execution))
    speed: SpeedConfig = field(metadata=setting(Affects.execution))
    wandb: WandbConfig = field(metadata=setting(Affects.nothing))
    lr: float
    """Peak learning rate."""
    seed: int = field(metadata=setting(scope=Scope.inference))
    name: str | None = field(metadata=setting(Affects.nothing, scope=Scope.command))
    """Name of the run in W&B; None for the task and the peft method."""
    dry_run: bool = field(metadata=setting(Affects.nothing, scope=Scope.command))

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
                f"replay.ratio ({self.replay.ratio:g}) has no effect with data=mock, which is random tokens "
                "alone; write replay=none, or choose other data"
            )

    @property
    def training(self) -> TrainingConfig:
        """The training task; only for runs that train."""
        assert isinstance(self.task, TrainingConfig)
        return self.task
