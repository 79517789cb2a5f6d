"""Training loop of transformers with PEFT, for ``throughput.py``: ``python -m benchmarks.baselines FILE.json``.

FILE.json holds the specification. Prints one line of JSON: the seconds of every timed step, the loss of every step,
peak memory, and the time of the first step.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


def main(specification: dict[str, Any]) -> None:
    import numpy as np
    import torch

    device = specification["device"]
    tokens = torch.from_numpy(np.load(specification["tokens"])).to(device)
    model, trained = _model(specification)
    optimizer = torch.optim.AdamW(trained, lr=specification["lr"], weight_decay=0.1, fused=True)  # as in qwen_cl
    called = torch.compile(model) if specification["compiled"] else model
    size, micro = specification["global_batch_size"], specification["micro_batch_size"]
    total = specification["warmup_steps"] + specification["timed_steps"]
    first_step, losses, ends = 0.0, [], []
    for step in range(total):
        rows = tokens[step * size : (step + 1) * size]
        loss = _step(called, rows, micro, device)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if step == 0:
            float(loss)  # synchronizes
            first_step = time.time() - specification["started"]
        if step + 1 == specification["warmup_steps"] and device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        ends.append(mark(device))
    seconds = between(ends[specification["warmup_steps"] - 1 :], device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    record = {"losses": [float(loss) for loss in losses], "first_step": first_step, "seconds": seconds, "peak": peak}
    record["ended"] = time.time()
    print(json.dumps(record))


def _model(specification: dict[str, Any]) -> tuple[Any, list[Any]]:
    model = base_model(specification)
    if specification["training"] == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config())
    model.train()
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def base_model(specification: dict[str, Any]) -> Any:
    """Load the model as qwen_cl does: fp32 weights for full fine-tuning, a bf16 base with fp32 adapters for LoRA."""
    import torch
    from transformers import AutoModelForCausalLM

    if specification["liger"]:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    in_bf16 = specification["training"] == "lora" and specification["device"] == "cuda"
    return AutoModelForCausalLM.from_pretrained(
        specification["model"],
        dtype=torch.bfloat16 if in_bf16 else torch.float32,
        attn_implementation="sdpa",
        use_cache=False,
    ).to(specification["device"])


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)


def _step(model: Any, rows: Any, micro: int, device: str) -> Any:
    """Run forward and backward on one global batch and return its mean loss."""
    import torch

    total = torch.zeros((), device=device)
    parts = len(rows) // micro
    for batch in rows.split(micro):
        inputs, labels = batch[:, :-1].clamp_min(0), batch[:, 1:]
        labels = labels.masked_fill(labels < 0, -100)  # padding at the end of a sequence
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            # shift_labels: the labels are shifted already, so every token of a sequence has one
            loss = model(input_ids=inputs, labels=labels, shift_labels=labels.contiguous()).loss / parts
        loss.backward()
        total += loss.detach()
    return total


def mark(device: str) -> Any:
    import torch

    if device != "cuda":
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def between(ends: list[Any], device: str) -> list[float]:
    import torch

    if device != "cuda":
        return [end - start for start, end in pairwise(ends)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(ends)]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
