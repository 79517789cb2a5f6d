"""Record a run's metrics: metrics.jsonl, W&B, and its progress."""

from __future__ import annotations

import math
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from rich.filesize import decimal

from qwen_cl.config.errors import NOT_FINITE_ADVICE
from qwen_cl.patches.registry import replace
from qwen_cl.planning.flops import TrainingFlops, peak_flops
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.metrics import TARGET
from qwen_cl.training.callbacks.base import RunCallback, RunContext
from qwen_cl.training.callbacks.step_timer import StepClock
from qwen_cl.training.model.evaluation import sum_losses
from qwen_cl.training.model.loss import TokenWeightedLoss

LOSS, GRADIENT = "reduced_train_loss", "grad_norm"
"""NeMo's names of the logged values that are recorded."""


@dataclass(slots=True)
class _Step:
    """A step that is computed, or still running on the GPU."""

    number: int
    lr: float
    tokens: int
    """Tokens of the run up to the end of this step, and pairs of tokens that attend."""
    pairs: int
    values: dict[str, torch.Tensor]
    """On the host, once ``read`` is done."""
    read: torch.cuda.Event | None


class RunRecorder(RunCallback):
    """The recorder of metrics.jsonl, W&B and the run's progress; validates before the first step.

    Every loss is the mean over loss tokens. Throughput counts the tokens of examples without padding.
    """

    reads_late = False
    """Read a step's values while the next step is running, so that the GPU does not wait. Only on a GPU."""

    def __init__(
        self, output_dir: str, log_interval: int, val_check_interval: int, flops_per_token: float, flops_per_pair: float
    ) -> None:
        self.folder = RunFolder(output_dir)
        self.flops = TrainingFlops(flops_per_token, flops_per_pair)
        self.log_interval = log_interval
        self.val_check_interval = val_check_interval
        self.tokens = 0
        self.pairs = 0
        self.clock = StepClock()
        self._since = (0.0, 0, 0)
        self._lr = 0.0
        self._logged: dict[str, torch.Tensor] = {}
        self._unread: _Step | None = None
        self._measured: tuple[int, float | None] = (0, None)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "pairs": self.pairs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.pairs = state_dict["tokens"], state_dict["pairs"]

    def val_loss_at(self, step: int) -> float | None:
        """Return the loss of the target's validation set, if it was evaluated at this step."""
        measured, loss = self._measured
        return loss if measured == step else None

    def bind(self, context: RunContext) -> None:
        super().bind(context)
        context.recorder = self

    def on_weights_read(self, done: int, total: int) -> None:
        """Report progress a few times a second while the model loads, on rank 0."""
        self.folder.update_status(phase=f"loading the model: {decimal(done)} of {decimal(total)}")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.reads_late = self.reads_late or torch.cuda.is_available()
        trainer.strategy.on_weights_read = self.on_weights_read  # qwen_cl/models/loading/nemo_hooks.py
        replace(pl_module, "_training_loss_reduction", TokenWeightedLoss())
        replace(pl_module, "log", self._keep)  # Lightning would wait for the GPU for each value

    def _keep(self, name: str, value: Any, **options: Any) -> None:
        if name in (LOSS, GRADIENT):
            self._logged[name] = torch.as_tensor(value).detach()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.context.stop is not None:
            self.context.stop.begin_training()
        self._since = (self.clock.start(), self.tokens, self.pairs)

    def on_step_zero(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate(trainer)
        # The time of earlier callbacks is not training time.
        self._since = (self.clock.start(), self.tokens, self.pairs)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, index)
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the end of the step it is that of the next

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        tokens, pairs = work_of_step(trainer.datamodule, step - 1)
        self.tokens += tokens
        self.pairs += pairs
        latest = self._on_its_way(step)
        self.record_last_step(trainer)  # the previous step
        self._unread = latest
        validates = step % self.val_check_interval == 0 or step == trainer.max_steps
        if validates or not self.reads_late:
            self.record_last_step(trainer)
        if validates:
            self._evaluate(trainer)
        if self.context.stop is not None and self.context.stop.agreed():
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.record_last_step(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with suppress(Exception):  # the run already has its reason
            self.record_last_step(trainer)

    def record_last_step(self, trainer: pl.Trainer) -> None:
        """Read and record the last step's values, if that is not done. Waits for the GPU.

        Raises:
            FloatingPointError: its loss or gradient is not finite. The gradient counts too: if its norm is not finite,
            the weights are corrupted although the loss was finite.
        """
        if self._unread is None:
            return
        step, self._unread = self._unread, None
        ended = self.clock.wait(step.read)
        values = {name: float(value) for name, value in step.values.items()}
        if self._is_recorded(trainer, step.number):
            self._record(trainer, step, ended, values)
        for what, name in (("loss", LOSS), ("gradient norm", GRADIENT)):
            if not math.isfinite(value := values.get(name, 0.0)):
                raise FloatingPointError(f"training {what} is {value} at step {step.number}; {NOT_FINITE_ADVICE}")

    def _is_recorded(self, trainer: pl.Trainer, step: int) -> bool:
        return step % self.log_interval == 0 or step == trainer.max_steps

    def _on_its_way(self, step: int) -> _Step:
        logged, self._logged = self._logged, {}
        values = {name: value.to("cpu", non_blocking=True) for name, value in logged.items()}
        return _Step(step, self._lr, self.tokens, self.pairs, values, self.clock.mark())

    def _evaluate(self, trainer: pl.Trainer) -> None:
        """Evaluate all named sets at the same step, in one record: the target beside the retention sets."""
        paused = time.monotonic()
        record: dict[str, Any] = {}
        for scored in trainer.datamodule.evaluation_sets:
            model, size = trainer.strategy.megatron_parallel, trainer.datamodule.micro_batch_size
            total, tokens = sum_losses(model, scored.examples, size)
            record[f"{scored.name}/loss"] = total / tokens
            if scored.num_bytes:
                record[f"{scored.name}/bits_per_byte"] = total / math.log(2) / scored.num_bytes
            record[f"{scored.name}/tokens"] = tokens
        self._measured = (trainer.global_step, record.get(f"{TARGET}/loss"))
        self._write(trainer, trainer.global_step, self.tokens, record, time.monotonic())
        since, tokens_before, pairs_before = self._since
        self._since = (since + self.clock.start() - paused, tokens_before, pairs_before)

    def _record(self, trainer: pl.Trainer, step: _Step, ended: float, values: dict[str, float]) -> None:
        since, tokens, pairs = self._since
        elapsed = max(ended - since, 1e-9)
        self._since = (ended, step.tokens, step.pairs)
        record = {
            "train/loss": values[LOSS],
            "optim/lr": step.lr,
            "throughput/tokens_per_second": (step.tokens - tokens) / elapsed,
            "tokens": step.tokens,
            "memory/peak_gib": peak_memory_gib(),
        }
        if peak := self._peak_flops(trainer):
            done = self.flops.of(step.tokens - tokens, step.pairs - pairs)
            record["throughput/mfu"] = done / elapsed / peak
        if GRADIENT in values:
            record["optim/grad_norm"] = values[GRADIENT]
        self._write(trainer, step.number, step.tokens, record, ended)

    def _peak_flops(self, trainer: pl.Trainer) -> float | None:
        """Return the peak of all devices; None on a CPU, in fp32, and on a GPU that planning/flops.py does not list."""
        if not torch.cuda.is_available() or not str(trainer.precision).startswith("bf16"):
            return None
        peak = peak_flops(torch.cuda.get_device_name())
        return None if peak is None else peak * trainer.world_size

    def _write(self, trainer: pl.Trainer, step: int, tokens: int, record: dict[str, Any], at: float) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.append_metrics({"step": step, "time": time.time() + at - time.monotonic(), **record})
        self.folder.update_status(step=step, phase="training")
        if self.context.wandb_logger is not None:
            self.context.wandb_logger.log({"tokens": tokens, **record}, step)


def peak_memory_gib() -> float:
    """Return this rank's peak: allocated on its GPU, or resident in its process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def work_of_step(data: Any, step: int) -> tuple[int, int]:
    """Return the tokens of a step of a data module, and its pairs of tokens that attend.

    The order of the examples is a function of seed and index, so any rank can count for all.
    """
    rows = range(step * data.global_batch_size, (step + 1) * data.global_batch_size)
    examples = [data.train_dataset[index] for index in rows]
    lengths = [stop - start - 1 for example in examples for start, stop in example.segments()]
    return sum(example.num_positions for example in examples), sum(n * (n + 1) // 2 for n in lengths)
