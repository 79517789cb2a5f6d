"""Training with TRL's SFTTrainer, for ``throughput.py``: ``python -m benchmarks.trl_baseline FILE.json``.

FILE.json and the printed record are those of ``benchmarks.baselines``. Options that cost nothing are on: fused Adam,
torch.compile where requested, no gradient checkpointing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.baselines import base_model, between, lora_config, mark


def main(specification: dict[str, Any]) -> None:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    device, warmup = specification["device"], specification["warmup_steps"]
    first_step: list[float] = []
    ends: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not ends and device == "cuda":
                torch.cuda.synchronize()
            if not ends:
                first_step.append(time.time() - specification["started"])
            if len(ends) + 1 == warmup and device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            ends.append(mark(device))

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = np.load(specification["tokens"])
    masks = [[0] + [1] * (rows.shape[1] - 1)] * len(rows)  # the first token has no loss
    with tempfile.TemporaryDirectory() as directory:
        trainer = InOrder(
            base_model(specification),
            args=_arguments(specification, directory),
            train_dataset=Dataset.from_dict({"input_ids": list(rows), "completion_mask": masks}),
            processing_class=AutoTokenizer.from_pretrained(specification["model"]),
            peft_config=lora_config() if specification["training"] == "lora" else None,
            callbacks=[Watch()],
        )
        trainer.train()
    seconds = between(ends[warmup - 1 :], device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    record = {"losses": losses, "first_step": first_step[0], "seconds": seconds, "peak": peak, "ended": time.time()}
    print(json.dumps(record))


def _arguments(specification: dict[str, Any], directory: str) -> Any:
    from trl import SFTConfig

    micro = specification["micro_batch_size"]
    return SFTConfig(
        output_dir=directory,
        max_steps=specification["warmup_steps"] + specification["timed_steps"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=specification["global_batch_size"] // micro,
        learning_rate=specification["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=specification["device"] == "cuda",
        use_cpu=specification["device"] == "cpu",
        torch_compile=specification["compiled"],
        use_liger_kernel=specification["liger"],
        gradient_checkpointing=False,
        max_length=None,
        completion_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
