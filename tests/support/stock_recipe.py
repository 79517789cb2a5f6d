"""NeMo's recipes at a size and with settings for tests on a CPU, without a source of weights.

Importing it prepares Megatron for a CPU: a recipe that names a function of this module does so wherever it is built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_cl.training.setup import prepare

prepare(cpu=True)

import lightning.pytorch as pl  # noqa: E402
import nemo_run as run  # noqa: E402
import torch  # noqa: E402
from nemo import lightning as nl  # noqa: E402
from nemo.collections import llm  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from qwen_cl.training.model.attention import layer_spec  # noqa: E402
from qwen_cl.training.model.step import data_step, forward_step  # noqa: E402


class Record(pl.Callback):
    """The callback that writes the first batch and the loss of each step."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.losses: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        stock = pl_module.config.forward_step_fn

        def forward(model: Any, batch: Any) -> Any:
            if model.training and not (self.directory / "batch.safetensors").exists():
                kept = {name: value for name, value in batch.items() if value is not None}
                save_file(kept, self.directory / "batch.safetensors")
            return stock(model, batch)

        pl_module.config.forward_step_fn = forward

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))
        if trainer.is_global_zero:
            (self.directory / "losses.json").write_text(json.dumps(self.losses))


def fit_this_machine(recipe: run.Partial, directory: Path, data: Path | None) -> run.Partial:
    """Return the recipe; ``data`` holds training.jsonl and validation.jsonl, or None for the recipe's random tokens."""
    recipe.model.config = run.Config(
        llm.Qwen25Config500M,
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        vocab_size=1537,
        seq_length=64,
        transformer_layer_spec=layer_spec,
        forward_step_fn=forward_step,
        data_step_fn=data_step,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        bf16=False,
    )
    trainer = recipe.trainer
    trainer.accelerator = "cpu"
    trainer.plugins = run.Config(nl.MegatronMixedPrecision, precision="32")
    trainer.max_steps = 2
    trainer.val_check_interval = 2
    trainer.limit_val_batches = 1
    trainer.num_sanity_val_steps = 0
    trainer.enable_progress_bar = False
    trainer.callbacks = [run.Config(Record, directory=str(directory))]
    trainer.strategy.ckpt_async_save = False
    trainer.strategy.ckpt_optim_fully_reshardable = True
    recipe.optim.config.bf16 = False
    recipe.optim.config.params_dtype = torch.float32
    recipe.log.log_dir = str(directory / "log")
    recipe.log.tensorboard = None
    if data is not None:
        recipe.data = run.Config(llm.FineTuningDataModule, dataset_root=str(data))
    recipe.data.seq_length = 64
    recipe.data.micro_batch_size = recipe.data.global_batch_size = 4
    recipe.data.num_workers = 0
    recipe.data.pin_memory = False
    return recipe


def forget_training() -> None:
    """Reset Megatron's global state, so that one process can train again without importing NeMo again."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.tensor_parallel import random

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    unset_num_microbatches_calculator()
    random.get_cuda_rng_tracker().reset()
