"""What watches a training run from inside: records, stops on request, writes the adapter at the end."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel

from qwen_cl.config.errors import NOT_FINITE_ADVICE
from qwen_cl.data.named_sets import TARGET
from qwen_cl.flops import TrainingFlops, peak_flops
from qwen_cl.megatron.evaluation import sum_losses
from qwen_cl.megatron.first_adapters import draw_from
from qwen_cl.megatron.steps import TokenWeightedLoss, mask_padded_vocabulary
from qwen_cl.run_folder import RunFolder
from qwen_cl.source.adapter import AdapterShape, save_adapter
from qwen_cl.stop import StopRequest

if TYPE_CHECKING:
    from qwen_cl.dashboard.connection import Dashboard


class Seed(pl.Callback):
    """What comes after the weights, adapters and dropout, is drawn from the run's seed; NeMo's own is fixed at 1234.

    And from the step, so that a run that goes on draws what it would have drawn, with no generator's state to keep.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        draw_from(self.seed)
        pl.seed_everything(self.seed + 100 * parallel_state.get_pipeline_model_parallel_rank(), verbose=False)
        tensor_parallel.model_parallel_cuda_manual_seed(self.seed)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        key = (self.seed, trainer.global_step, parallel_state.get_data_parallel_rank())
        seed = int(np.random.default_rng(key).integers(2**30))  # Megatron adds its ranks to it
        torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


class MaskPaddedVocabulary(pl.Callback):
    """See :func:`qwen_cl.megatron.steps.mask_padded_vocabulary`."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        mask_padded_vocabulary(trainer.strategy.megatron_parallel, self.vocab_size)


class RunRecorder(pl.Callback):
    """Writes metrics.jsonl, the dashboard and the run's progress; validates before the first step.

    Every loss is the mean over the tokens that count. Throughput counts the tokens of the rows, not their padding.
    """

    def __init__(
        self, output_dir: str, log_interval: int, val_check_interval: int, flops_per_token: float, flops_per_pair: float
    ) -> None:
        self.folder = RunFolder(output_dir)
        self.flops = TrainingFlops(flops_per_token, flops_per_pair)
        self.log_interval = log_interval
        self.val_check_interval = val_check_interval
        self.stop: StopRequest | None = None
        self.dashboard: Dashboard | None = None
        self.tokens = 0
        self.pairs = 0
        """Of tokens that attend."""
        self._since = (0.0, 0, 0)
        self._lr = 0.0
        self._measured: tuple[int, float | None] = (0, None)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "pairs": self.pairs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.pairs = state_dict["tokens"], state_dict["pairs"]

    def val_loss_at(self, step: int) -> float | None:
        """Of the target's validation set, if it was measured at this step."""
        measured, loss = self._measured
        return loss if measured == step else None

    def on_weights_read(self, done: int, total: int) -> None:
        """A few times a second while the model loads, on rank 0 (qwen_cl/source/nemo.py)."""
        size, unit = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
        self.folder.update_status(phase=f"loading the model: {done / size:.1f} of {total / size:.1f} {unit}")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module._training_loss_reduction = TokenWeightedLoss()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stop is not None:
            self.stop.begin_training()
        self._since = (time.monotonic(), self.tokens, self.pairs)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step == 0 and index == 0:  # not before: with an adapter, NeMo has just moved the model
            self._evaluate(trainer)
            self._since = (
                time.monotonic(),
                self.tokens,
                self.pairs,
            )  # what other callbacks did before is no training either
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # at its end the next step's is there already

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        tokens, pairs = _work_of_step(trainer, step - 1)
        self.tokens += tokens
        self.pairs += pairs
        if step % self.log_interval == 0 or step == trainer.max_steps:
            self._record_step(trainer, step)
        if step % self.val_check_interval == 0 or step == trainer.max_steps:
            self._evaluate(trainer)
        if self.stop is not None and self.stop.agreed():
            trainer.should_stop = True

    def _evaluate(self, trainer: pl.Trainer) -> None:
        """Every named set at the same step, in one line: what was learnt beside what was forgotten."""
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
        self._write(trainer, trainer.global_step, record)
        since, tokens_before, pairs_before = self._since
        self._since = (since + time.monotonic() - paused, tokens_before, pairs_before)

    def _record_step(self, trainer: pl.Trainer, step: int) -> None:
        metrics = trainer.callback_metrics
        loss = float(metrics["reduced_train_loss"])
        since, tokens, pairs = self._since
        elapsed = max(time.monotonic() - since, 1e-9)
        self._since = (time.monotonic(), self.tokens, self.pairs)
        record = {
            "train/loss": loss,
            "optim/lr": self._lr,
            "throughput/tokens_per_second": (self.tokens - tokens) / elapsed,
            "tokens": self.tokens,
            "memory/peak_gib": peak_memory_gib(),
        }
        if peak := self._peak_flops(trainer):
            done = self.flops.of(self.tokens - tokens, self.pairs - pairs)
            record["throughput/mfu"] = done / elapsed / peak
        if "grad_norm" in metrics:
            record["optim/grad_norm"] = float(metrics["grad_norm"])
        self._write(trainer, step, record)
        require_finite(trainer)

    def _peak_flops(self, trainer: pl.Trainer) -> float | None:
        """Of all devices; None on a CPU, in fp32, and on a GPU that qwen_cl/flops.py does not know."""
        if not torch.cuda.is_available() or not str(trainer.precision).startswith("bf16"):
            return None
        peak = peak_flops(torch.cuda.get_device_name())
        return None if peak is None else peak * trainer.world_size

    def _write(self, trainer: pl.Trainer, step: int, record: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.append_metrics({"step": step, "time": time.time(), **record})
        self.folder.update_status(step=step, phase="training")
        if self.dashboard is not None:
            self.dashboard.log({"tokens": self.tokens, **record}, step)


def require_finite(trainer: pl.Trainer) -> None:
    """The gradient too: where its norm is not finite, the loss still was, and the weights are no longer.

    Raises:
        FloatingPointError: the last step's loss or gradient is not finite.
    """
    for name, key in (("loss", "reduced_train_loss"), ("gradient norm", "grad_norm")):
        value = float(trainer.callback_metrics.get(key, 0.0))
        if not math.isfinite(value):
            raise FloatingPointError(f"training {name} is {value} at step {trainer.global_step}; {NOT_FINITE_ADVICE}")


def peak_memory_gib() -> float:
    """Of this rank: allocated on its GPU, or resident in its process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _work_of_step(trainer: pl.Trainer, step: int) -> tuple[int, int]:
    """Tokens, and pairs of tokens that attend. The order of the rows is a function of seed and index, so any rank can
    count for all."""
    data = trainer.datamodule
    rows = range(step * data.global_batch_size, (step + 1) * data.global_batch_size)
    examples = [data.train_dataset[index] for index in rows]
    lengths = [stop - start - 1 for example in examples for start, stop in example.segments()]
    return sum(example.num_positions for example in examples), sum(n * (n + 1) // 2 for n in lengths)


class SaveAdapter(pl.Callback):
    """Writes the trained adapter in PEFT's format when training ends."""

    def __init__(
        self,
        *,
        directory: str,
        source: str,
        rank: int,
        alpha: float,
        dropout: float,
        target_modules: list[str],
        dora: bool,
    ) -> None:
        self.directory = Path(directory)
        self.source = source
        self.shape = AdapterShape(rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, dora=dora)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > 0:
            save_adapter(trainer.strategy.megatron_parallel, self.shape, self.source, self.directory)
